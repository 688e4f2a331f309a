"""Where a prefix's keys and values go in, in one layer's attention, and what they are made from."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, PLAIN, TRAINED, arrow, box, label, plus

SIZE = (11.4, 5.2)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.3, 3.7, "x", 13, style="italic")
    label(axes, 0.55, 3.25, "positions\nP, P+1, …", 8)
    box(axes, 1.7, 3.2, 1.9, 1.0, FROZEN, "q, k, v\nfrozen")
    box(axes, 6.9, 3.2, 2.6, 1.0, FROZEN, "attention\nover P + t keys")
    label(axes, 10.9, 3.7, "y", 13, style="italic")
    arrow(axes, (0.5, 3.7), (1.7, 3.7))
    arrow(axes, (3.6, 4.0), (6.9, 4.0))
    label(axes, 4.4, 4.2, "Q  (h, t, e)", 8)
    arrow(axes, (3.6, 3.45), (5.28, 3.45))
    label(axes, 4.4, 3.65, "K, V  (g, t, e)", 8)
    plus(axes, 5.5, 3.45, ";")
    arrow(axes, (5.72, 3.45), (6.9, 3.45))
    label(axes, 6.3, 3.65, "(g, P + t, e)", 8)
    arrow(axes, (9.5, 3.7), (10.7, 3.7))
    box(axes, 0.5, 0.9, 1.7, 0.8, TRAINED, "E  (P, d)")
    box(axes, 2.6, 0.9, 1.7, 0.8, TRAINED, "W1  (m, d)")
    box(axes, 4.7, 0.9, 0.9, 0.8, PLAIN, "tanh")
    box(axes, 6.0, 0.9, 2.4, 0.8, TRAINED, "W2  (2·L·g·e, m)")
    for start, end in ((2.2, 2.6), (4.3, 4.7), (5.6, 6.0)):
        arrow(axes, (start, 1.3), (end, 1.3))
    arrow(axes, (7.2, 1.7), (7.2, 2.35), (5.5, 2.35), (5.5, 3.23))
    label(axes, 8.85, 2.35, "this layer's Pk, Pv  (g, P, e)", 8)
    label(axes, 4.3, 4.75, "self_attn", family="monospace")
    label(axes, 4.4, 0.6, "the model's root: byway.default", family="monospace")
    label(axes, 5.0, 0.2, "the side path: P·d + d·m + m + 2·L·g·e·(m + 1) trained numbers, or 2·L·P·g·e without the MLP")
