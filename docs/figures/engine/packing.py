"""The same four rows padded, packed, and packed with their common head computed once."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, box, label

SIZE = (14, 6.2)
HEAD, ROWS = 0.9, (2.6, 1.6, 4.2, 0.9)
"""Width of the common head, and of what is each row's own."""


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    longest = HEAD + max(ROWS)
    for number, own in enumerate(ROWS):
        y = 5.1 - 0.6 * number
        box(axes, 0.3, y, HEAD, 0.45, FROZEN, "system", 7)
        box(axes, 0.3 + HEAD, y, own, 0.45, TRAINED, f"row {number + 1}", 7)
        if own < max(ROWS):
            box(axes, 0.3 + HEAD + own, y, longest - HEAD - own, 0.45, PLAIN, "padding", 7)
    label(axes, 0.3 + longest / 2, 5.95, "padded: every row as long as the longest")
    x = 0.3
    for number, own in enumerate(ROWS):
        box(axes, x, 1.75, HEAD, 0.45, FROZEN, "system", 7)
        box(axes, x + HEAD, 1.75, own, 0.45, TRAINED, f"row {number + 1}", 7)
        x += HEAD + own
    label(axes, 6.75, 2.55, "packed: one row, each document attends to itself alone")
    box(axes, 0.3, 0.25, HEAD, 0.45, FROZEN, "system", 7)
    x = 0.3 + HEAD
    for number, own in enumerate(ROWS):
        box(axes, x, 0.25, own, 0.45, TRAINED, f"row {number + 1}", 7)
        x += own
    label(axes, 5.4, 1.05, "a common head is run once: each row attends to it and to itself")
