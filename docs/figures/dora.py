"""Where DoRA's side path is attached: the low-rank change of direction and the trained length, next to a frozen linear map."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (10.4, 5.0)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.35, 4.0, "x", 13, style="italic")
    box(axes, 1.9, 3.5, 3.4, 1.0, FROZEN, "W  (out, in)\nfrozen, untouched")
    box(axes, 6.6, 2.3, 1.9, 0.8, TRAINED, "·(m/n − 1)")
    box(axes, 1.75, 0.7, 1.1, 0.8, PLAIN, "dropout")
    box(axes, 3.2, 0.7, 1.2, 0.8, TRAINED, "A  (r, in)")
    box(axes, 4.8, 0.7, 1.3, 0.8, TRAINED, "B  (out, r)")
    box(axes, 6.6, 0.7, 1.9, 0.8, TRAINED, "·s·(m/n)")
    plus(axes, 9.2, 4.0)
    label(axes, 10.15, 4.0, "y", 13, style="italic")
    arrow(axes, (0.55, 4.0), (1.9, 4.0))
    arrow(axes, (5.3, 4.0), (8.98, 4.0))
    arrow(axes, (9.42, 4.0), (10.0, 4.0))
    arrow(axes, (5.9, 4.0), (5.9, 2.7), (6.6, 2.7))
    arrow(axes, (8.5, 2.7), (9.2, 2.7), (9.2, 3.78))
    arrow(axes, (1.2, 4.0), (1.2, 1.1), (1.75, 1.1))
    for start, end in ((2.85, 3.2), (4.4, 4.8), (6.1, 6.6)):
        arrow(axes, (start, 1.1), (end, 1.1))
    arrow(axes, (8.5, 1.1), (9.2, 1.1), (9.2, 3.78))
    label(axes, 3.6, 4.75, "q_proj", family="monospace")
    label(axes, 3.4, 2.7, "m (out,) trained\nn = ‖W + s·BA‖ for each output", 9)
    label(axes, 4.8, 0.25, "the side path q_proj.byway.default: r·(in + out) + out trained numbers")
