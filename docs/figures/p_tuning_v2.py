"""Deep prompts: trained keys and values in every layer of an encoder, and the head that reads the real tokens."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label

SIZE = (11.0, 5.6)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    box(axes, 4.2, 0.7, 3.6, 0.7, FROZEN, "embeddings, positions P, P+1, …")
    for layer, y in ((1, 1.8), (2, 2.8), (3, 3.8)):
        name = "L" if layer == 3 else str(layer)
        box(axes, 4.2, y, 3.6, 0.7, FROZEN, f"layer {name}  (frozen)")
        box(axes, 1.0, y, 2.3, 0.7, TRAINED, f"Pk, Pv of layer {name}")
        arrow(axes, (3.3, y + 0.35), (4.2, y + 0.35))
    label(axes, 6.0, 3.65, "…", 12)
    for y in (1.4, 2.5):
        arrow(axes, (6.0, y), (6.0, y + (0.4 if y == 1.4 else 0.3)))
    box(axes, 9.0, 3.8, 1.5, 0.7, TRAINED, "head")
    arrow(axes, (7.8, 4.15), (9.0, 4.15))
    label(axes, 8.4, 4.35, "h[CLS], h_t", 8)
    arrow(axes, (9.75, 4.5), (9.75, 5.1))
    label(axes, 9.75, 5.3, "classes, tags", 9)
    label(axes, 6.0, 0.18, "[CLS]  x1  x2  …", 10)
    arrow(axes, (6.0, 0.38), (6.0, 0.7))
    label(axes, 2.15, 1.3, "(g, P, e) each", 8)
    label(axes, 2.15, 4.75, "dropout on them in training", 8)
    label(axes, 5.2, 5.3, "trained: 2·L·P·g·e numbers and the head")
