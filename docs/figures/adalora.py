"""Where AdaLoRA's side path is attached, and which of its triplets are kept."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (10.4, 4.4)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.35, 3.3, "x", 13, style="italic")
    box(axes, 2.6, 2.8, 4.6, 1.0, FROZEN, "W  (out, in)\nfrozen, untouched")
    box(axes, 1.75, 0.9, 1.1, 0.8, PLAIN, "dropout")
    box(axes, 3.2, 0.9, 1.3, 0.8, TRAINED, "A  (r₀, in)")
    box(axes, 4.85, 0.9, 1.2, 0.8, TRAINED, "·E  (r₀)")
    box(axes, 6.4, 0.9, 1.4, 0.8, TRAINED, "B  (out, r₀)")
    box(axes, 8.1, 0.9, 0.7, 0.8, PLAIN, "·s")
    plus(axes, 9.2, 3.3)
    label(axes, 10.15, 3.3, "y", 13, style="italic")
    arrow(axes, (0.55, 3.3), (2.6, 3.3))
    arrow(axes, (7.2, 3.3), (8.98, 3.3))
    arrow(axes, (9.42, 3.3), (10.0, 3.3))
    arrow(axes, (1.2, 3.3), (1.2, 1.3), (1.75, 1.3))
    for start, end in ((2.85, 3.2), (4.5, 4.85), (6.05, 6.4), (7.8, 8.1)):
        arrow(axes, (start, 1.3), (end, 1.3))
    arrow(axes, (8.8, 1.3), (9.2, 1.3), (9.2, 3.08))
    label(axes, 4.9, 4.1, "q_proj", family="monospace")
    label(axes, 5.4, 2.1, "E_i = 0 for the triplets with the smallest scores in the whole model", 9)
    label(axes, 5.0, 0.35, "the side path q_proj.byway.default: r₀·(in + out + 1) trained numbers")
