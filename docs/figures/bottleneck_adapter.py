"""Where the two kinds of bottleneck read and write in a post-norm layer."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label, plus

SIZE = (10, 5.6)


def _side(axes: Any, x: float, y: float) -> None:
    """down, σ, up from x to x + 3.6 at height y."""
    box(axes, x, y, 1.5, 0.8, TRAINED, "down  (m, d)", 9)
    box(axes, x + 1.7, y, 0.4, 0.8, TRAINED, "σ", 9)
    box(axes, x + 2.3, y, 1.5, 0.8, TRAINED, "up  (d, m)", 9)
    arrow(axes, (x + 1.5, y + 0.4), (x + 1.7, y + 0.4))
    arrow(axes, (x + 2.1, y + 0.4), (x + 2.3, y + 0.4))


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    for y, name in ((4.3, "houlsby"), (1.6, "pfeiffer")):
        label(axes, 0.75, y + 1.1, name, 11, family="monospace")
        box(axes, 0.9, y - 0.45, 1.5, 0.9, FROZEN, "sub-layer", 9)
        box(axes, 8.2, y - 0.4, 0.9, 0.8, TRAINED if name == "houlsby" else FROZEN, "LN", 9)
        arrow(axes, (0.3, y), (0.9, y))
        arrow(axes, (9.1, y), (9.8, y))
        label(axes, 0.35, y + 0.3, "x", 12, style="italic")
    # z + f(z), then + x
    plus(axes, 6.9, 4.3)
    plus(axes, 7.6, 4.3)
    arrow(axes, (2.4, 4.3), (6.68, 4.3))
    arrow(axes, (7.12, 4.3), (7.38, 4.3))
    arrow(axes, (7.82, 4.3), (8.2, 4.3))
    arrow(axes, (0.6, 4.3), (0.6, 5.2), (7.6, 5.2), (7.6, 4.52))
    label(axes, 2.65, 4.52, "z", 12, style="italic")
    _side(axes, 2.9, 2.9)
    arrow(axes, (2.6, 4.3), (2.6, 3.3), (2.9, 3.3))
    arrow(axes, (6.7, 3.3), (6.9, 3.3), (6.9, 4.08))
    # x + z + f(LN(x + z))
    plus(axes, 2.9, 1.6)
    plus(axes, 7.6, 1.6)
    arrow(axes, (2.4, 1.6), (2.68, 1.6))
    arrow(axes, (3.12, 1.6), (7.38, 1.6))
    arrow(axes, (7.82, 1.6), (8.2, 1.6))
    arrow(axes, (0.6, 1.6), (0.6, 2.4), (2.9, 2.4), (2.9, 1.82))
    box(axes, 2.5, 0.2, 0.7, 0.8, FROZEN, "LN", 9)
    arrow(axes, (3.4, 1.6), (3.4, 1.2), (2.85, 1.2), (2.85, 1.0))
    _side(axes, 3.5, 0.2)
    arrow(axes, (3.2, 0.6), (3.5, 0.6))
    arrow(axes, (7.3, 0.6), (7.6, 0.6), (7.6, 1.38))
