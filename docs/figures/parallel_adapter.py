"""Where a parallel adapter is attached, next to the feed-forward part."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (10, 3.9)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.35, 2.9, "h", 13, style="italic")
    label(axes, 0.35, 2.5, "(…, d)", 8)
    box(axes, 2.3, 2.45, 4.9, 0.9, FROZEN, "feed-forward, frozen")
    box(axes, 2.0, 0.6, 1.5, 0.8, TRAINED, "down  (m, d)", 9)
    box(axes, 3.95, 0.6, 0.5, 0.8, TRAINED, "σ")
    box(axes, 4.9, 0.6, 1.5, 0.8, TRAINED, "up  (d, m)", 9)
    box(axes, 6.85, 0.6, 0.7, 0.8, PLAIN, "·s")
    plus(axes, 8.4, 2.9)
    label(axes, 9.65, 2.9, "z", 13, style="italic")
    arrow(axes, (0.55, 2.9), (2.3, 2.9))
    arrow(axes, (7.2, 2.9), (8.18, 2.9))
    arrow(axes, (8.62, 2.9), (9.45, 2.9))
    arrow(axes, (1.2, 2.9), (1.2, 1.0), (2.0, 1.0))
    for start, end in ((3.5, 3.95), (4.45, 4.9), (6.4, 6.85)):
        arrow(axes, (start, 1.0), (end, 1.0))
    arrow(axes, (7.55, 1.0), (8.4, 1.0), (8.4, 2.68))
    label(axes, 4.75, 3.6, "mlp", family="monospace")
    label(axes, 4.75, 0.25, "mlp.byway.default: 2dm + m + d trained numbers a layer")
