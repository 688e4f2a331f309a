"""Fold side paths into a module's own tensors, in blocks of rows where possible.

    W[rows] ← W[rows] + ΔW[rows]        pieces of about a million elements

A 2048 × 8192 weight is 64 MB in float32. With new tensors for the weight, the update, the sum and the difference, a
merge would spend most of its time on first touches of memory; a piece fits into the processor's cache. A low-rank
update is folded by rows; an update that needs the whole weight (DoRA's norms, convolutions, normalizations) is one
piece. Merging in memory, merging files and checking a merge all fold through this module and so agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byway.core.slots import SLOT, RowFold, SidePath, slot_of
from byway.core.weights import dense, is_linear, is_map
from byway.errors import AdapterError

__all__ = ["Piece", "Scratch", "changed_tensors", "folded", "own_tensors", "pieces", "row_blocks", "surely_finite"]

_PIECE = 1 << 20
"""Elements of a piece: 4 MB in float32."""


@dataclass(frozen=True)
class Piece:
    """Rows of one of a module's tensors before and after folding, in float32 or float64, not rounded."""

    key: str
    """``weight``, ``bias``, ``dense.weight`` …"""
    rows: slice
    """Rows of the tensor; all of them if the tensor is one piece."""
    before: Tensor
    after: Tensor
    spare: Tensor | None = None
    """Scratch tensor of the same shape."""

    @property
    def finite(self) -> bool:
        """True if the result contains neither infinities nor NaN."""
        if not (self.after.is_floating_point() and self.after.numel()):
            return True
        # one pass, no mask tensor; both ends are NaN if any element is
        return all(bool(end.isfinite()) for end in torch.aminmax(self.after))

    @property
    def differs(self) -> bool:
        """True if folding changes any element."""
        return not torch.equal(self.after, self.before)

    def change(self) -> float:
        """Return the largest absolute change of an element."""
        if not self.before.numel():
            return 0.0
        low, high = torch.aminmax(torch.sub(self.after, self.before, out=self.spare))
        return max(-float(low), float(high))


class Scratch:
    """Reusable scratch tensors, since newly allocated memory is slow on first touch."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, rows: Tensor, slot: int = 0) -> Tensor:
        """Return an uninitialized float32 or float64 tensor shaped like `rows`, in the memory of `slot`."""
        key = (slot, _wide(rows.dtype), rows.device)
        held = self._held.get(key)
        if held is None or held.numel() < rows.numel():
            held = self._held[key] = torch.empty(rows.numel(), dtype=key[1], device=rows.device)
        return held[: rows.numel()].view(rows.shape)


def pieces(module: nn.Module, sides: Sequence[SidePath], scratch: Scratch | None = None) -> Iterator[Piece]:
    """Yield the tensors of `module` with `sides` folded in, in order. Unchanged tensors may be left out.

    A piece may be written to the module before the next one is requested, and is valid only until then, since the next
    one reuses its memory. Pass the same `scratch` for several modules to reuse it there as well.
    """
    folds = _by_rows(module, sides)
    if folds is not None:
        weight, scratch = dense(module), scratch or Scratch()
        for rows in row_blocks(weight):
            kept = weight[rows]
            before, after, spare = (scratch.like(kept, slot) for slot in range(3))
            before.copy_(kept)
            after.copy_(kept)
            for fold in folds:
                fold.add(after, rows, spare)
            yield Piece("weight", rows, before, after, spare)
        return
    before = own_tensors(module)
    after = before
    for side in sides:
        after = side.fold(dict(after))
    for key, value in after.items():
        yield Piece(key, slice(None), before[key], value)


def changed_tensors(path: str, module: nn.Module, sides: Sequence[SidePath], scratch: Scratch, unchanged: str) -> tuple[str, ...]:
    """Return the names of the module's tensors that folding `sides` changes. Computes the fold without writing it.

    Args:
        path: the module's path, for messages.
        unchanged: end of the error message, such as ``the model is unchanged``.

    Raises:
        NotMergeable: a side path cannot be folded.
        AdapterError: a folded tensor is not finite.
    """
    changed: list[str] = []
    finite = surely_finite(module, sides)
    for piece in pieces(module, sides, scratch):
        if not (finite or piece.finite):
            raise AdapterError(f"merging {path} would give a {piece.key} that is not finite; {unchanged}", "check the adapter")
        if piece.key not in changed and piece.differs:
            changed.append(piece.key)
            if finite:
                break  # folded by rows: the weight is the only tensor
    return tuple(changed)


def surely_finite(module: nn.Module, sides: Sequence[SidePath]) -> bool:
    """True if bounds alone prove that folding gives finite values; False if they do not."""
    folds = _by_rows(module, sides)
    if folds is None:
        return False
    weight = dense(module)
    largest = max(abs(float(end)) for end in torch.aminmax(weight)) + sum(fold.bound() for fold in folds)
    return largest < torch.finfo(_wide(weight.dtype)).max  # comparisons with NaN are false


def folded(module: nn.Module, sides: Sequence[SidePath]) -> dict[str, Tensor]:
    """Return the module's own tensors with all of `sides` folded in."""
    tensors = own_tensors(module)
    for side in sides:
        tensors = side.fold(dict(tensors))
    return tensors


def _by_rows(module: nn.Module, sides: Sequence[SidePath]) -> list[RowFold] | None:
    """Return how each of `sides` is folded by rows, or None if not all of them can be."""
    folds = [fold for side in sides if (fold := side.row_fold()) is not None]
    return folds if is_linear(module) and len(folds) == len(sides) else None


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Split the rows of a matrix into pieces."""
    step = max(_PIECE // max(weight.shape[1], 1), 1)
    return (slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what side paths fold into, in float32 or float64: weight and bias of a map, else the state dict."""
    if is_map(module):
        own = {"weight": dense(module)}
        bias = module._parameters.get("bias")
        if bias is not None:
            own["bias"] = bias.detach()
    else:
        slot = slot_of(module)
        adapters = set() if slot is None else {f"{SLOT}.{key}" for key in slot.state_dict()}
        own = {key: value for key, value in module.state_dict().items() if key not in adapters}
    return {k: v.to(_wide(v.dtype)) if v.is_floating_point() else v for k, v in own.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
