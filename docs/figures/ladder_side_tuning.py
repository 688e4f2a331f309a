"""The ladder: a narrow side network climbs beside the frozen backbone and reads every rung; gradients stay on its side."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label, plus

SIZE = (9.4, 10.2)
RUNGS = ((1.7, "block 0", "0", "D₁"), (3.6, "block 1", "1", "D₂"), (5.9, "block L−1", "L−1", "$D_L$"))
LEFT, RIGHT = 2.1, 7.5


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, LEFT, 10.0, "backbone (d): frozen, no graph", 9)
    label(axes, RIGHT, 10.0, "side network (d/ρ): trained", 9)
    box(axes, 0.8, 0.2, 2.6, 0.6, FROZEN, "embedding, e")
    box(axes, 4.3, 1.0, 0.9, 0.46, TRAINED, "D₀", 9)
    arrow(axes, (LEFT, 1.23), (4.3, 1.23))
    arrow(axes, (5.2, 1.23), (RIGHT, 1.23), (RIGHT, 2.73))
    below = 0.8
    for height, name, index, down in RUNGS:
        tap = height + 1.25
        box(axes, 0.8, height, 2.6, 0.8, FROZEN, name)
        box(axes, 4.3, tap - 0.23, 0.9, 0.46, TRAINED, down, 9)
        box(axes, 6.3, tap + 0.45, 2.4, 0.7, TRAINED, f"side block {index}")
        plus(axes, RIGHT, tap, "μ")
        arrow(axes, (LEFT, tap), (4.3, tap))
        arrow(axes, (5.2, tap), (RIGHT - 0.22, tap))
        arrow(axes, (RIGHT, tap + 0.22), (RIGHT, tap + 0.45))
        if index == "L−1":
            label(axes, LEFT, height - 0.45, "⋮", 13)
            label(axes, RIGHT, tap - 0.55, "⋮", 13)
            arrow(axes, (LEFT, height + 0.8), (LEFT, 8.6))
        else:
            arrow(axes, (LEFT, below), (LEFT, height))
        if index == "1":
            arrow(axes, (RIGHT, tap - 0.75), (RIGHT, tap - 0.22))
            arrow(axes, (LEFT, height + 0.8), (LEFT, height + 1.55))
        below = height + 0.8
    box(axes, 0.8, 8.6, 2.6, 0.7, FROZEN, "norm: its output is replaced", 8)
    box(axes, 6.3, 8.6, 2.4, 0.7, TRAINED, "norm, U  (d/ρ → d)")
    arrow(axes, (RIGHT, 8.3), (RIGHT, 8.6))
    box(axes, 3.9, 8.6, 1.9, 0.7, FROZEN, "the model's\nown head", 8)
    arrow(axes, (6.3, 8.95), (5.8, 8.95))
    label(axes, LEFT, 9.62, "model", family="monospace")
    label(axes, RIGHT, 9.62, "model.byway.default", family="monospace")
