"""The units in which states are computed and stored: which documents lie together, and where in a unit each of them begins.

Units follow from the documents' lengths alone, never from a seed, a batch or what lies on a disk: so the sums inside a matrix product, and
with them the last bits of every state, are the same whoever computes a unit and when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["UNIT_TOKENS", "Collate", "Units", "cut_units"]

UNIT_TOKENS = 2048
"""Positions of one unit, padding included; a longer document is a unit of its own."""

Collate = Callable[[Sequence[int]], Mapping[str, Any]]
"""Documents, by index → what the model is called with to compute them."""


@dataclass(frozen=True)
class Units:
    """Documents in units. ``lengths``: tokens of each document; ``kept``: the positions whose states are kept, None: all of them."""

    lengths: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...] | None
    members: tuple[tuple[int, ...], ...]
    """Unit → its documents."""
    place: tuple[tuple[int, int], ...]
    """Document → its unit, and the row at which it begins there."""

    def rows(self, document: int) -> int:
        """How many states of `document` are kept."""
        return self.lengths[document] if self.kept is None else len(self.kept[document])

    def size(self, unit: int) -> int:
        """How many states `unit` holds."""
        return sum(self.rows(document) for document in self.members[unit])

    @property
    def total(self) -> int:
        """States of all documents."""
        return sum(map(self.rows, range(len(self.lengths))))

    def digest(self, collate: Collate) -> str:
        """SHA-256 of the documents as the model is given them, unit by unit, and of the kept positions."""
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
    """Documents by length, then index, in units of at most `tokens` positions when padded to their longest."""
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
