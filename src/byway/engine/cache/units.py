"""The documents of a cache in units, which are computed and stored together, and in the batches of a run.

Units follow from the lengths of the documents alone, not from a seed, a batch or the files present. The sums inside a
matrix product, and with them the last bits of every state, are then the same whoever computes a unit and when.

A batch holds documents as rows with padding on either side, or in one packed row.

Shapes: b rows, t columns, d width, n tokens of a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byway.errors import AdapterError

__all__ = ["UNIT_TOKENS", "Collate", "Piece", "Stretch", "Units", "cut_units", "gathered", "pieces", "scattered"]

UNIT_TOKENS = 2048
"""Positions of one unit, padding included. A longer document is a unit of its own."""

Collate = Callable[[Sequence[int]], Mapping[str, Any]]
"""Indices of documents → arguments of the model that computes their states."""


@dataclass(frozen=True)
class Units:
    """Documents in units."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    kept: tuple[tuple[int, ...], ...] | None
    """The positions of each document whose states are kept; None: all."""
    members: tuple[tuple[int, ...], ...]
    """Unit → its documents."""
    place: tuple[tuple[int, int], ...]
    """Document → its unit, and the row of the unit at which it begins."""

    def rows(self, document: int) -> int:
        """Return the number of states kept of `document`."""
        return self.lengths[document] if self.kept is None else len(self.kept[document])

    def size(self, unit: int) -> int:
        """Return the number of states in `unit`."""
        return sum(self.rows(document) for document in self.members[unit])

    @property
    def total(self) -> int:
        """States of all documents."""
        return sum(map(self.rows, range(len(self.lengths))))

    def digest(self, collate: Collate) -> str:
        """Return the SHA-256 of the model's arguments for all documents, unit by unit, and of the kept positions."""
        state = hashlib.sha256(repr((self.lengths, self.kept)).encode())
        for members in self.members:
            for name, value in sorted(collate(members).items()):
                if isinstance(value, Tensor):
                    state.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
                    state.update(value.detach().cpu().contiguous().numpy().tobytes())
                else:
                    state.update(f"{name} {value!r}\n".encode())
        return state.hexdigest()


def cut_units(lengths: Sequence[int], kept: Sequence[Sequence[int]] | None = None, tokens: int = UNIT_TOKENS) -> Units:
    """Cut documents, sorted by length, then index, into units of at most `tokens` positions, padding included."""
    members: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not members or (len(members[-1]) + 1) * lengths[document] > tokens:
            members.append([])
        members[-1].append(document)
    place = [(0, 0)] * len(lengths)
    for unit, documents in enumerate(members):
        row = 0
        for document in documents:
            place[document] = (unit, row)
            row += lengths[document] if kept is None else len(kept[document])
    chosen = None if kept is None else tuple(tuple(positions) for positions in kept)
    return Units(tuple(lengths), chosen, tuple(map(tuple, members)), tuple(place))


# ---------------------------------------------------------------- batches

Stretch = tuple[int, int, int]
"""Part of a document in a packed row: (index in the batch, its first position, the position after its last)."""


@dataclass(frozen=True)
class Piece:
    """A part of a document, and where it is in a batch."""

    document: int
    """Index of the document in the batch."""
    first: int
    last: int
    """The position after its last."""
    row: int
    column: int


def pieces(shape: tuple[int, int], lengths: Sequence[int], mask: Tensor | None, stretches: Sequence[Stretch] | None = None) -> list[Piece]:
    """Return where a batch of `shape` (b, t) holds the documents of these `lengths`, in their order.

    Args:
        shape: (b, t).
        lengths: tokens of each document.
        mask: the 2-D attention mask, which tells the side of the padding.
        stretches: the parts of a packed row; None: all documents as a whole.

    Raises:
        AdapterError: a batch of this shape cannot be made of these documents.
    """
    b, t = shape
    packed = [(i, 0, n) for i, n in enumerate(lengths)] if stretches is None else stretches
    if b == 1 and sum(last - first for _, first, last in packed) == t:
        found, column = [], 0
        for document, first, last in packed:
            found.append(Piece(document, first, last, 0, column))
            column += last - first
        return found
    if b != len(lengths) or max(lengths) > t:
        listed = ", ".join(map(str, lengths[:8])) + (" …" if len(lengths) > 8 else "")
        raise AdapterError(
            f"a batch of {b} rows and {t} columns is not made of documents of {listed} tokens",
            "pass the indices of the batch's rows, in their order",
        )
    left = [False] * b
    if mask is not None and mask.ndim == 2 and min(lengths) < t:
        left = [not seen for seen in mask[:, 0].bool().tolist()]
    return [Piece(i, 0, n, i, t - n if left[i] else 0) for i, n in enumerate(lengths)]


def gathered(states: Tensor, found: Sequence[Piece], kept: Sequence[Sequence[int]] | None) -> Tensor:
    """Return the states (b, t, d) of whole documents as (Σ n, d); with `kept` only those positions of each."""
    whole = [states[p.row, p.column : p.column + p.last - p.first] for p in found]
    if kept is not None:
        whole = [rows[torch.tensor(positions, dtype=torch.long, device=rows.device)] for rows, positions in zip(whole, kept, strict=True)]
    return torch.cat(whole)


def scattered(states: Sequence[Tensor], found: Sequence[Piece], shape: tuple[int, int], kept: Sequence[Sequence[int]] | None) -> Tensor:
    """Undo :func:`gathered`: (b, t, d), zeros elsewhere, from the states of each document (n or as kept, d)."""
    b, t = shape
    width = states[0].shape[-1]
    if b == 1 and kept is None and sum(p.last - p.first for p in found) == t:
        return torch.cat([states[p.document][p.first : p.last] for p in found])[None]
    whole = states[0].new_zeros((b, t, width))
    for p in found:
        if kept is None:
            whole[p.row, p.column : p.column + p.last - p.first] = states[p.document][p.first : p.last]
            continue
        within = [(number, position) for number, position in enumerate(kept[p.document]) if p.first <= position < p.last]
        if within:
            numbers, positions = (torch.tensor(column) for column in zip(*within, strict=True))
            whole[p.row, p.column + positions - p.first] = states[p.document][numbers]
    return whole
