"""Where the states of documents stand in a batch, whatever its layout: rows with padding on either side, or one packed row.

Legend: b rows, t columns, d width, n tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byway.errors import AdapterError

__all__ = ["Segment", "Stretch", "gathered", "places", "scattered"]

Stretch = tuple[int, int, int]
"""(which of the batch's documents, its first position, the one after its last), as such stretches follow each other in a packed row."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a document and where it stands."""

    document: int
    """Which of the batch's documents."""
    first: int
    last: int
    row: int
    column: int


def places(
    shape: tuple[int, int], lengths: Sequence[int], mask: Tensor | None, stretches: Sequence[Stretch] | None = None
) -> list[Segment]:
    """The segments of a batch of `shape` (b, t) that holds documents of these `lengths`, in their order.

    `mask`: the 2-D attention mask, which tells on which side padding is. `stretches`: what a packed row is made of where that is not simply
    all documents whole.
    """
    b, t = shape
    packed = [(i, 0, n) for i, n in enumerate(lengths)] if stretches is None else stretches
    if b == 1 and sum(last - first for _, first, last in packed) == t:
        found, column = [], 0
        for document, first, last in packed:
            found.append(Segment(document, first, last, 0, column))
            column += last - first
        return found
    if b != len(lengths) or max(lengths) > t:
        raise AdapterError(
            f"a batch of {b} rows and {t} columns is not made of documents of {', '.join(map(str, lengths[:8]))}"
            + (" …" if len(lengths) > 8 else "")
            + " tokens",
            "give the indices of the batch's rows, in their order",
        )
    left = [False] * b
    if mask is not None and mask.ndim == 2 and min(lengths) < t:
        left = [not seen for seen in mask[:, 0].bool().tolist()]
    return [Segment(i, 0, n, i, t - n if left[i] else 0) for i, n in enumerate(lengths)]


def gathered(states: Tensor, segments: Sequence[Segment], kept: Sequence[Sequence[int]] | None) -> Tensor:
    """The states (b, t, d) of whole documents, one after the other (Σ n, d); with `kept` only those positions of each."""
    whole = [states[s.row, s.column : s.column + s.last - s.first] for s in segments]
    if kept is not None:
        whole = [rows[torch.tensor(positions, dtype=torch.long, device=rows.device)] for rows, positions in zip(whole, kept, strict=True)]
    return torch.cat(whole)


def scattered(
    states: Sequence[Tensor], segments: Sequence[Segment], shape: tuple[int, int], kept: Sequence[Sequence[int]] | None
) -> Tensor:
    """The inverse: (b, t, d) from the states of each document (n or as many as are kept, d); zero where there is none."""
    b, t = shape
    width = states[0].shape[-1]
    if b == 1 and kept is None and sum(s.last - s.first for s in segments) == t:
        return torch.cat([states[s.document][s.first : s.last] for s in segments])[None]
    whole = states[0].new_zeros((b, t, width))
    for s in segments:
        if kept is None:
            whole[s.row, s.column : s.column + s.last - s.first] = states[s.document][s.first : s.last]
            continue
        inside = [(number, position) for number, position in enumerate(kept[s.document]) if s.first <= position < s.last]
        if inside:
            numbers, positions = (torch.tensor(column) for column in zip(*inside, strict=True))
            whole[s.row, s.column + positions - s.first] = states[s.document][numbers]
    return whole
