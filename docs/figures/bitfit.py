"""Where a trained bias stands: beside the module, as its difference to the base's."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label, plus

SIZE = (9, 3.6)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.4, 2.4, "x", 13, style="italic")
    box(axes, 1.3, 1.9, 3.6, 1.0, FROZEN, "a linear map or a norm, with b\nfrozen")
    plus(axes, 6.3, 2.4)
    label(axes, 8.3, 2.4, "y", 13, style="italic")
    box(axes, 5.4, 0.3, 1.8, 0.8, TRAINED, "b′ − b")
    arrow(axes, (0.6, 2.4), (1.3, 2.4))
    arrow(axes, (4.9, 2.4), (6.08, 2.4))
    arrow(axes, (6.52, 2.4), (8.1, 2.4))
    arrow(axes, (6.3, 1.1), (6.3, 2.18))
    label(axes, 3.1, 3.25, "query, output.dense, LayerNorm, …", family="monospace")
    label(axes, 2.9, 0.7, "b′ is trained; it starts as b")
