"""Where virtual tokens stand at a model's input, and where they are taken out again."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label

SIZE = (10, 4.1)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    for place, text in enumerate(("v1", "v2", "v3")):
        box(axes, 0.4 + 0.8 * place, 2.3, 0.7, 0.9, TRAINED, text)
    for place, text in enumerate(("a", "b", "c", "d")):
        box(axes, 2.8 + 0.8 * place, 2.3, 0.7, 0.9, FROZEN, text)
    label(axes, 1.55, 3.6, "$P_e$ (P, d), trained")
    label(axes, 4.35, 3.6, "E(x) (t, d), frozen")
    box(axes, 6.6, 2.1, 1.5, 1.3, FROZEN, "trunk\nfrozen")
    arrow(axes, (6.0, 2.75), (6.6, 2.75))
    label(axes, 3.2, 1.9, "positions 0 … P−1, then P … P+t−1; the mask is 1 for virtual tokens", 8)
    arrow(axes, (8.1, 2.75), (8.7, 2.75), (8.7, 0.8), (6.0, 0.8))
    for place, text in enumerate(("a", "b", "c", "d")):
        box(axes, 2.8 + 0.8 * place, 0.35, 0.7, 0.9, PLAIN, text)
    label(axes, 7.4, 0.35, "last hidden state, (t, d):\nthe columns of $P_e$ are taken out", 8)
    arrow(axes, (2.8, 0.8), (2.2, 0.8))
    box(axes, 0.9, 0.35, 1.3, 0.9, FROZEN, "head")
    label(axes, 7.35, 3.6, "model.byway.default", family="monospace")
