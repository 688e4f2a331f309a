"""One cell of the parity table: a method on an architecture, compared with a twin that does the same with other code.

The twin is HF peft, or transformers' own modules with the same tensors (trained in place or inserted). The cells:

* ``forward``: relative L2 error of the logits;
* ``gradients``: the same of the gradients, the worst of the trained tensors;
* ``generate``: relative error of the logits of all steps of greedy decoding with a cache, or the share of tokens that
  differ if any does;
* ``files``: relative error of the logits after ours → theirs → ours, or after our own format if there is no other.

A cell that cannot exist holds the reason instead of a number.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import byway
from byway.core.adapter import Adapter
from tests.methods.cases import SCALES
from tests.parity.sizes import build
from tests.tiny import inputs, randomize

COLUMNS = ("forward", "gradients", "generate", "files")
TOLERANCE: Mapping[str, float] = {"forward": 1e-5, "gradients": 1e-5, "generate": 1e-5, "files": 1e-5}
"""Relative, in fp32, the same for all methods; greedy tokens must be equal."""
GENERATING = ("llama", "qwen2", "gpt2", "opt", "t5")
NEW_TOKENS = 8
ENCODES = "an encoder with a classifier does not generate"

Between = Callable[[Adapter], None]


@dataclass(frozen=True)
class Cell:
    """The measured error, or the reason why there is none."""

    error: float | None = None
    reason: str = ""
    own_format: bool = False

    def good(self, column: str) -> bool:
        """True if the error is within the column's tolerance; files in our own format must be exact."""
        return self.error is not None and self.error <= (0.0 if self.own_format else TOLERANCE[column])

    def text(self, column: str) -> str:
        """The cell as the table shows it."""
        if self.error is None:
            return "–"
        shown = "equal" if self.error == 0 else f"{self.error:.0e}"
        return (shown if self.good(column) else f"**{shown}**") + ("°" if self.own_format else "")


Cells = dict[str, Cell]


def together(found: Iterable[Cells], choose: Callable[..., Cell] = max) -> Cells:
    """Return the worst of several comparisons in each column (with ``min``, the best)."""
    every, chosen = list(found), {}
    for column in COLUMNS:
        cells = [cells[column] for cells in every if column in cells]
        measured = [cell for cell in cells if cell.error is not None]
        chosen[column] = choose(measured, key=_size) if measured else cells[0]
        own = all(cell.own_format for cell in measured)
        chosen[column] = replace(chosen[column], own_format=bool(measured) and own)
    return chosen


def _size(cell: Cell) -> float:
    return math.inf if cell.error is None or math.isnan(cell.error) else cell.error


class Twin(Protocol):
    """The same function of the same tensors, computed by other code."""

    model: Any

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the names of :meth:`ours`; NaN where an element is not trained."""
        ...

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return our gradients by those names."""
        ...

    def save(self, directory: Path) -> bool:
        """Write files that we can load; return False if this twin has no files."""
        ...


@dataclass(frozen=True)
class Setting:
    """The model and inputs of a comparison."""

    family: str
    seed: int

    def model(self) -> Any:
        """Return a new base, always with the same weights."""
        return build(self.family, self.seed)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a forward pass."""
        return inputs(self.family, self.seed + 1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


def loss(logits: Tensor) -> Tensor:
    """Return a loss to which every logit contributes."""
    return logits.float().pow(2).mean()


def measure(method: Any, at: Setting, twin_of: Any, *, between: Between | None = None) -> Cells:
    """Measure the four cells of `method`. `between` is called on our adapter after the twin was made (a mutation)."""
    with tempfile.TemporaryDirectory() as folder:
        model, x = at.model(), at.inputs()
        adapter = byway.attach(model, method)
        scale = SCALES.get(type(method).__module__.rpartition(".")[2], 0.3)
        randomize(adapter.named_parameters(), at.seed + 2, scale)
        twin: Twin = twin_of(adapter, at, Path(folder) / "ours")
        with torch.no_grad(), byway.disabled(model):
            bare = model(**x).logits
        own_before = model(**x).logits
        if relative(own_before, bare) < 1e-3:
            raise AssertionError("the adapter does nothing: every comparison would pass")
        if between is not None:
            between(adapter)
        own = model(**x).logits
        their = twin.model(**x).logits[:, -own.shape[1] :]
        cells = {"forward": Cell(relative(own, their))}
        loss(own).backward()
        loss(their).backward()
        cells["gradients"] = Cell(gradient_error(twin.ours(adapter), twin.gradients()))
        cells["generate"] = _generate(model, twin.model, at)
        with torch.no_grad():  # torch uses other attention kernels if a gradient is required
            cells["files"] = _files(adapter, twin, at, Path(folder), model(**x).logits)
    return cells


def gradient_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the worst relative error of the tensors; no denominator is below a tenth of the largest norm."""
    if set(ours) != set(theirs):
        raise AssertionError(f"not the same tensors: {sorted(set(ours) ^ set(theirs))[:6]}")
    trained = {name: ~ours[name].isnan() for name in theirs}
    sizes = {name: float(theirs[name].double()[trained[name]].norm()) for name in theirs}
    floor = max(sizes.values()) / 10
    if floor == 0:
        raise AssertionError("no gradient reaches anything")
    differences = {name: float((ours[name].double() - theirs[name].double())[trained[name]].norm()) for name in theirs}
    return max(differences[name] / max(sizes[name], floor) for name in theirs)


def _generate(model: Any, twin: Any, at: Setting) -> Cell:
    if at.family not in GENERATING:
        return Cell(reason=ENCODES)
    ids = at.inputs()["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        ours, theirs = (m.generate(input_ids=ids, **options) for m in (model, twin))
    different = float((ours.sequences[:, -NEW_TOKENS:] != theirs.sequences[:, -NEW_TOKENS:]).float().mean())
    return Cell(different or relative(torch.stack(ours.logits), torch.stack(theirs.logits)))


def _files(adapter: Adapter, twin: Twin, at: Setting, folder: Path, expected: Tensor) -> Cell:
    theirs = twin.save(folder / "theirs")
    if not theirs:
        adapter.save(folder / "own")
    other = at.model()
    byway.load(other, folder / ("theirs" if theirs else "own"))
    return Cell(relative(other(**at.inputs()).logits, expected), own_format=not theirs)
