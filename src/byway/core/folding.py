"""Side paths folded into a module's own tensors, a piece at a time where they allow it.

    W[rows] ← W[rows] + ΔW[rows]        pieces of about a million numbers

A weight of 2048 × 8192 is 64 MB in float32. Made anew for the weight, the update, the sum and their difference, a merge is mostly memory
that is touched for the first time; a piece stays where the processor has it at hand. A low-rank update is folded by rows; whatever needs
the whole weight (DoRA's lengths, convolutions, norms) is one piece. A piece's numbers do not depend on who asks for it: merging in memory,
from file to file and checking a merge go through here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byway.core.slots import SidePath, slot_of
from byway.core.weights import dense, is_conv, is_embedding, is_linear

__all__ = ["Piece", "Scratch", "folded", "own_tensors", "pieces", "row_blocks", "surely_finite"]

_PIECE = 1 << 20
"""Numbers of a piece: 4 MB in float32."""


@dataclass(frozen=True)
class Piece:
    """Part of one of a module's tensors, before and after, in float32 at least and not rounded."""

    key: str
    """``weight``, ``bias``, ``dense.weight`` …"""
    rows: slice
    """Which rows it is; all of them, where the tensor is one piece."""
    before: Tensor
    after: Tensor
    spare: Tensor | None = None
    """Room of the same shape."""

    @property
    def finite(self) -> bool:
        """Whether the result holds neither infinities nor what is no number."""
        if not (self.after.is_floating_point() and self.after.numel()):
            return True
        # in one pass and without a tensor of answers; what is no number is passed on by both
        return all(bool(end.isfinite()) for end in torch.aminmax(self.after))

    @property
    def differs(self) -> bool:
        return not torch.equal(self.after, self.before)

    def change(self) -> float:
        """The largest absolute change."""
        if not self.before.numel():
            return 0.0
        low, high = torch.aminmax(torch.sub(self.after, self.before, out=self.spare))
        return max(-float(low), float(high))


class Scratch:
    """Room for numbers that are not kept: memory that is asked for again and again is touched for the first time again and again."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, rows: Tensor, place: int = 0) -> Tensor:
        """As many numbers, of any value, in float32 at least; what was given out for the same `place` before is overwritten."""
        key = (place, _wide(rows.dtype), rows.device)
        held = self._held.get(key)
        if held is None or held.numel() < rows.numel():
            held = self._held[key] = torch.empty(rows.numel(), dtype=key[1], device=rows.device)
        return held[: rows.numel()].view(rows.shape)


def pieces(module: nn.Module, sides: Sequence[SidePath], scratch: Scratch | None = None) -> Iterator[Piece]:
    """Every tensor of `module` as all of `sides`, one after the other, leave it; those that none of them changes may be missing.

    A piece's rows may be written to the module before the next is asked for, and then its numbers are no longer its own.

    `scratch`: room that is used again for every piece, and by the next module that is given it.
    """
    if is_linear(module) and all(side.folds_rows for side in sides):
        weight, scratch = dense(module), scratch or Scratch()
        for rows in row_blocks(weight):
            kept = weight[rows]
            before, after, spare = (scratch.like(kept, place) for place in range(3))
            before.copy_(kept)
            after.copy_(kept)
            for side in sides:
                side.fold_rows(after, rows, spare)
            yield Piece("weight", rows, before, after, spare)
        return
    before = own_tensors(module)
    after = before
    for side in sides:
        after = side.fold(dict(after))
    for key, value in after.items():
        yield Piece(key, slice(None), before[key], value)


def surely_finite(module: nn.Module, sides: Sequence[SidePath]) -> bool:
    """Whether bounds alone say that no number of what :func:`pieces` gives is infinite or none; False: that is not known."""
    if not (is_linear(module) and all(side.folds_rows for side in sides)):
        return False
    weight = dense(module)
    largest = max(abs(float(end)) for end in torch.aminmax(weight)) + sum(side.fold_bound() for side in sides)
    return largest < torch.finfo(_wide(weight.dtype)).max  # what is no number is not


def folded(module: nn.Module, sides: Sequence[SidePath]) -> dict[str, Tensor]:
    """The module's own tensors with all of `sides` in them, whole."""
    tensors = own_tensors(module)
    for side in sides:
        tensors = side.fold(dict(tensors))
    return tensors


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a matrix, so many at a time as make a piece."""
    step = max(_PIECE // max(weight.shape[1], 1), 1)
    return (slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a side path folds into: weight and bias for maps, every own tensor for anything else; in float32 at least."""
    if is_linear(module) or is_conv(module) or is_embedding(module):
        own = {"weight": dense(module)}
        bias = module._parameters.get("bias")
        if bias is not None:
            own["bias"] = bias.detach()
    else:
        slot = slot_of(module)
        hung = set() if slot is None else {f"byway.{key}" for key in slot.state_dict()}
        own = {key: value for key, value in module.state_dict().items() if key not in hung}
    return {k: v.to(_wide(v.dtype)) if v.is_floating_point() else v for k, v in own.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
