"""What runs in a step when only upper layers are trained: live, and from the cache."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label

SIZE = (13, 6.6)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    _column(axes, 0.6, "live: the first time a row is met", ("tokens", "layers 0 … 25\nfrozen, no graph", "run once"))
    _column(axes, 7.2, "from the cache: every step", ("tokens", "layers 0 … 25\nnot run", "skipped"))
    box(axes, 4.6, 2.55, 2.2, 1.0, FROZEN, "states on disk\nper document", 8)
    arrow(axes, (3.6, 3.05), (4.6, 3.05))
    arrow(axes, (6.8, 3.05), (7.8, 3.05))


def _column(axes: Any, x: float, title: str, names: tuple[str, str, str]) -> None:
    """The model from its tokens (below) to its loss (above)."""
    tokens, trunk, note = names
    width = 3.0
    label(axes, x + width / 2, 6.3, title)
    label(axes, x + width / 2, 0.3, tokens)
    box(axes, x, 0.9, width, 1.3, FROZEN if note == "run once" else PLAIN, trunk, 9)
    box(axes, x, 3.6, 0.6 * width, 1.0, FROZEN, "layers 26 … 29", 9)
    box(axes, x + 0.65 * width, 3.6, 0.35 * width, 1.0, TRAINED, "side\npaths", 9)
    box(axes, x, 5.1, width, 0.7, FROZEN, "head at learned tokens", 9)
    label(axes, x + width / 2, 3.05, "frontier: hidden states", 8, style="italic")
    if note == "run once":
        arrow(axes, (x + width / 2, 0.5), (x + width / 2, 0.9))
        arrow(axes, (x + width / 2, 2.2), (x + width / 2, 2.85))
    arrow(axes, (x + width / 2, 3.25), (x + width / 2, 3.6))
    arrow(axes, (x + width / 2, 4.6), (x + width / 2, 5.1))
