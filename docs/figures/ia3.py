"""Where the vectors of (IA)³ stand: after keys and values, and before the second feed-forward matrix."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label, plus

SIZE = (11, 4.2)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 2.6, 3.95, "k_proj, v_proj", family="monospace")
    label(axes, 0.3, 2.9, "x", 13, style="italic")
    box(axes, 0.9, 2.4, 2.1, 1.0, FROZEN, "W, b\nfrozen")
    plus(axes, 3.8, 2.9, "×")
    label(axes, 4.95, 2.9, "k, v", 12, style="italic")
    box(axes, 3.0, 0.7, 1.6, 0.8, TRAINED, "l  (out, 1)")
    arrow(axes, (0.45, 2.9), (0.9, 2.9))
    arrow(axes, (3.0, 2.9), (3.58, 2.9))
    arrow(axes, (4.02, 2.9), (4.6, 2.9))
    arrow(axes, (3.8, 1.5), (3.8, 2.68))
    label(axes, 8.4, 3.95, "down_proj", family="monospace")
    label(axes, 6.1, 2.9, "h", 13, style="italic")
    plus(axes, 7.1, 2.9, "×")
    box(axes, 7.9, 2.4, 2.1, 1.0, FROZEN, "W, b\nfrozen")
    label(axes, 10.7, 2.9, "y", 13, style="italic")
    box(axes, 6.3, 0.7, 1.6, 0.8, TRAINED, "l  (1, in)")
    arrow(axes, (6.25, 2.9), (6.88, 2.9))
    arrow(axes, (7.32, 2.9), (7.9, 2.9))
    arrow(axes, (10.0, 2.9), (10.55, 2.9))
    arrow(axes, (7.1, 1.5), (7.1, 2.68))
    label(axes, 5.4, 0.2, "every number of l starts at one")
