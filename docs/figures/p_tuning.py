"""The small encoder that makes virtual tokens, and a template with tokens on both sides of the text."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label

SIZE = (10, 4.1)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    box(axes, 0.3, 2.7, 1.5, 0.8, TRAINED, "E_p  (P, d)")
    box(axes, 2.4, 2.7, 2.0, 0.8, TRAINED, "BiLSTM\n2 layers, d/2 each way", 8)
    box(axes, 5.0, 2.7, 2.2, 0.8, TRAINED, "Linear, ReLU, Linear")
    for start, end in ((1.8, 2.4), (4.4, 5.0)):
        arrow(axes, (start, 3.1), (end, 3.1))
    label(axes, 8.7, 3.1, "virtual tokens\n(P, d)")
    arrow(axes, (7.2, 3.1), (7.95, 3.1))
    pieces = (("T1", TRAINED), ("T2", TRAINED), ("a", FROZEN), ("b", FROZEN), ("c", FROZEN), ("is", FROZEN), ("T3", TRAINED))
    for place, (text, color) in enumerate(pieces):
        box(axes, 0.4 + 0.85 * place, 0.8, 0.75, 0.8, color, text)
    arrow(axes, (8.7, 2.75), (8.7, 2.1), (0.8, 2.1), (0.8, 1.6))
    arrow(axes, (8.7, 2.1), (5.88, 2.1), (5.88, 1.6))
    box(axes, 7.3, 0.7, 1.7, 1.0, FROZEN, "trunk\nfrozen")
    arrow(axes, (6.25, 1.2), (7.3, 1.2))
    label(axes, 3.4, 0.4, "<T1> <T2> {text} is <T3>", family="monospace")
