"""One cell of the parity table: a method on an architecture, beside a twin that computes the same by other code, compared in numbers.

The twin is HF peft, or transformers' own modules with the same tensors trained in place or put in by hand. The cells are ``forward`` and
``gradients`` (relative L2 error of the logits; the worst of the trained tensors), ``generate`` (relative error of the logits of all steps
of greedy decoding with a cache, or the share of tokens that differ, if any does) and ``files`` (relative error of the logits after ours →
theirs → ours, or after our own format where nobody else has one). A cell that cannot exist holds the reason instead of a number.
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
"""fp32, for whichever method: relative 1e-5; greedy tokens are equal."""
GENERATING = ("llama", "qwen2", "gpt2", "opt", "t5")
NEW_TOKENS = 8
ENCODES = "an encoder with a classifier does not generate"

Between = Callable[[Adapter], None]


@dataclass(frozen=True)
class Cell:
    """What was measured, or why nothing was."""

    error: float | None = None
    reason: str = ""
    own_format: bool = False

    def good(self, column: str) -> bool:
        """Whether the error is within the column's tolerance; what Byway alone writes and reads comes back exactly."""
        return self.error is not None and self.error <= (0.0 if self.own_format else TOLERANCE[column])

    def text(self, column: str) -> str:
        """As the table shows it."""
        if self.error is None:
            return "–"
        shown = "equal" if self.error == 0 else f"{self.error:.0e}"
        return (shown if self.good(column) else f"**{shown}**") + ("°" if self.own_format else "")


Cells = dict[str, Cell]


def together(found: Iterable[Cells], choose: Callable[..., Cell] = max) -> Cells:
    """Column by column, the worst of several comparisons (or, with ``min``, the best)."""
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
    """The same function of the same tensors, by other code."""

    model: Any

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of what is trained, by the names of :meth:`ours`; NaN where a number is not trained."""
        ...

    def ours(self, adapter: Adapter) -> dict[str, Tensor]:
        """Our gradients by those names."""
        ...

    def save(self, directory: Path) -> bool:
        """Write files that we read; False where this twin has none."""
        ...


@dataclass(frozen=True)
class Setting:
    """On what a comparison is made."""

    family: str
    seed: int

    def model(self) -> Any:
        """A fresh base, always the same."""
        return build(self.family, self.seed)

    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward."""
        return inputs(self.family, self.seed + 1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))


def loss(logits: Tensor) -> Tensor:
    """Something that every logit has a share in."""
    return logits.float().pow(2).mean()


def measure(method: Any, at: Setting, twin_of: Any, *, between: Between | None = None) -> Cells:
    """The four cells of `method`; `between` is called after the twin was made (a mutation of ours)."""
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
        with torch.no_grad():  # torch attends with other kernels where something has a gradient
            cells["files"] = _files(adapter, twin, at, Path(folder), model(**x).logits)
    return cells


def gradient_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The worst of the tensors; one whose gradient is below a tenth of the largest is measured against that tenth."""
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
