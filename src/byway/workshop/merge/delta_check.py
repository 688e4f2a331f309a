"""How much of an adapter is in merged files: read back, tensor by tensor, against what should be there.

share = ⟨ΔW_eff, ΔW⟩ / ‖ΔW‖² with ΔW_eff = W_merged − W_base (1: all of the adapter is there; 0: none of it),
error = ‖ΔW_eff − ΔW‖ / ‖ΔW‖ (rounding adds to it). What should be there is folded anew from the adapter's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byway.base.directory import stored_dtype, stored_files
from byway.core.slots import base_modules
from byway.core.weights import is_quantized
from byway.disk.shards import Stored, dtype_of, read, same_bytes, stored_tensors
from byway.workshop.merge.plan import Fold, Names, folds, ties

if TYPE_CHECKING:
    from byway.inference.runs import Found

__all__ = ["Share", "Survival", "compare_weights"]


@dataclass(frozen=True)
class Share:
    """How much of one module's wanted change is in the merged files."""

    path: str
    share: float
    cosine: float
    error: float
    size: float
    """‖ΔW‖ / ‖W‖."""


@dataclass(frozen=True)
class _Measured:
    share: Share
    inner: float
    size_squared: float


@dataclass(frozen=True)
class Survival:
    """What was found in the files."""

    measured: tuple[_Measured, ...]
    untouched: int
    """Tensors that the adapter does not touch and that are the base's, bit for bit (rounded once where a dtype was asked for)."""
    differing: tuple[str, ...]
    """Names of those that are not."""
    dtype: torch.dtype
    """The coarsest dtype that a merged tensor is stored in."""
    loaded: torch.dtype
    """The base's own."""
    parameters: int
    tokenizer: Any

    @property
    def share(self) -> float:
        """Over all modules."""
        return sum(m.inner for m in self.measured) / (sum(m.size_squared for m in self.measured) or 1.0)

    @property
    def modules(self) -> tuple[Share, ...]:
        """Each by itself."""
        return tuple(m.share for m in self.measured)


@torch.no_grad()
def compare_weights(directory: Path, found: Found, stored_in: Path | None) -> Survival:
    """The tensors in `directory` against those of the base (in `stored_in`, if it has a directory) with the adapters of `found`."""
    new = stored_tensors(sorted(directory.glob("*.safetensors")))
    model, tokenizer = found.load_base(stored_dtype(stored_in))
    found.attach(model)
    old = stored_files(stored_in)
    names, tied = Names(model, old), ties(model)
    measured: list[_Measured] = []
    touched: set[str] = set()
    dtypes: set[torch.dtype] = set()
    for fold in folds(model)[0]:
        placed = {key: name for key in fold.changed if (name := names.quiet(fold.site.path, key)) is not None}
        touched |= set(placed.values())
        present = {key: name for key, name in placed.items() if name in new}
        if not present and any(names.quiet(other, "weight") in new for other in tied.get(fold.site.path, ())):
            continue  # the other end of a tie holds it
        dtypes |= {dtype_of(new[name].code) for name in present.values()}
        measured.append(_share(fold, {key: read(new, name) for key, name in present.items()}))
    quantized = {names.quiet(path, "weight") for path, module in base_modules(model) if is_quantized(module)}
    same, other = _untouched(old, new, names, {*touched, *(q for q in quantized if q)})
    coarsest = max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
    return Survival(tuple(measured), same, tuple(other), coarsest, model.dtype, model.num_parameters(), tokenizer)


def _share(fold: Fold, found: Mapping[str, Tensor]) -> _Measured:
    before, after = fold.before(), fold.after()
    inner = size = effective = error = weight = 0.0
    for key in fold.changed:
        base = before[key].double()
        wanted = after[key].double() - base
        actual = found[key].double() - base if key in found and found[key].shape == base.shape else torch.zeros_like(base)
        inner += float((wanted * actual).sum())
        size += float(wanted.square().sum())
        effective += float(actual.square().sum())
        error += float((actual - wanted).square().sum())
        weight += float(base.square().sum())
    cosine = inner / math.sqrt(size * effective) if size and effective else 0.0
    share = Share(fold.site.path, inner / size, cosine, math.sqrt(error / size), math.sqrt(size / weight) if weight else math.inf)
    return _Measured(share, inner, size)


def _untouched(old: Mapping[str, Stored], new: Mapping[str, Stored], names: Names, touched: set[str]) -> tuple[int, list[str]]:
    """(how many are the same, names of the others). Where the dtype was changed on purpose, the same numbers in it."""
    same, other = 0, []
    for name, was in old.items():
        kept = names.renamed(name)
        if kept is None or kept in touched:
            continue
        if kept not in new:
            other.append(f"{kept} is missing")
        elif new[kept].code == was.code:
            equal = same_bytes(was, new[kept])
            same, other = same + equal, other if equal else [*other, kept]
        else:
            cast = read(old, name).to(dtype_of(new[kept].code))
            equal = torch.equal(cast, read(new, kept))
            same, other = same + equal, other if equal else [*other, kept]
    return same, other
