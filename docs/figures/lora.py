"""Where LoRA's side path is attached to a linear map, and the shapes of its factors."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (10, 4.1)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.35, 2.9, "x", 13, style="italic")
    label(axes, 0.35, 2.5, "(…, in)", 8)
    box(axes, 2.3, 2.3, 4.6, 1.2, FROZEN, "W  (out, in)\nfrozen, untouched")
    box(axes, 1.75, 0.5, 1.1, 0.8, PLAIN, "dropout")
    box(axes, 3.35, 0.5, 1.4, 0.8, TRAINED, "A  (r, in)")
    box(axes, 5.25, 0.5, 1.4, 0.8, TRAINED, "B  (out, r)")
    box(axes, 7.15, 0.5, 0.7, 0.8, PLAIN, "·s")
    plus(axes, 8.4, 2.9)
    label(axes, 9.65, 2.9, "y", 13, style="italic")
    label(axes, 9.65, 2.5, "(…, out)", 8)
    arrow(axes, (0.55, 2.9), (2.3, 2.9))
    arrow(axes, (6.9, 2.9), (8.18, 2.9))
    arrow(axes, (8.62, 2.9), (9.45, 2.9))
    arrow(axes, (1.2, 2.9), (1.2, 0.9), (1.75, 0.9))
    for start, end in ((2.85, 3.35), (4.75, 5.25), (6.65, 7.15)):
        arrow(axes, (start, 0.9), (end, 0.9))
    arrow(axes, (7.85, 0.9), (8.4, 0.9), (8.4, 2.68))
    label(axes, 4.6, 3.8, "q_proj", family="monospace")
    label(axes, 4.6, 1.6, "q_proj.byway.default", family="monospace")
    label(axes, 4.6, 0.12, "the side path: r·(in + out) trained numbers")
