"""A chain of weight transforms: the side path sees the weight, and adds what the changed weight would have answered besides."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (10.4, 4.6)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.35, 3.5, "x", 13, style="italic")
    box(axes, 1.9, 3.0, 2.2, 1.0, FROZEN, "W  (out, in)\nfrozen")
    for place, text in ((2.2, "f₁\nlow_rank"), (4.0, "f₂\nmagnitude"), (5.8, "f₃\nyour own")):
        box(axes, place, 0.7, 1.3, 0.9, TRAINED, text)
    box(axes, 7.75, 0.75, 1.2, 0.8, PLAIN, "W′ − W")
    plus(axes, 9.2, 3.5)
    plus(axes, 8.35, 2.3, "·")
    label(axes, 10.15, 3.5, "y", 13, style="italic")
    arrow(axes, (0.55, 3.5), (1.9, 3.5))
    arrow(axes, (4.1, 3.5), (8.98, 3.5))
    arrow(axes, (9.42, 3.5), (10.0, 3.5))
    arrow(axes, (2.85, 3.0), (2.85, 1.6))
    for start, end in ((3.5, 4.0), (5.3, 5.8), (7.1, 7.75)):
        arrow(axes, (start, 1.15), (end, 1.15))
    arrow(axes, (8.35, 1.55), (8.35, 2.08))
    arrow(axes, (1.2, 3.5), (1.2, 2.3), (8.13, 2.3))
    arrow(axes, (8.57, 2.3), (9.2, 2.3), (9.2, 3.28))
    label(axes, 3.0, 4.3, "q_proj", family="monospace")
    label(axes, 4.8, 0.25, "the side path q_proj.byway.default: each link is a map from matrix to matrix")
