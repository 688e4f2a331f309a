"""A norm and the trained copy that answers in its place."""

from __future__ import annotations

from typing import Any

from sketch import FROZEN, TRAINED, arrow, box, label

SIZE = (9, 3.6)


def draw(axes: Any) -> None:
    """Draw onto axes of SIZE."""
    label(axes, 0.4, 1.0, "x", 13, style="italic")
    box(axes, 2.6, 2.0, 3.4, 0.9, FROZEN, "norm (γ, β)\nfrozen, does not run")
    box(axes, 2.6, 0.5, 3.4, 1.0, TRAINED, "its copy (γ′, β′)")
    label(axes, 8.2, 1.0, "y", 13, style="italic")
    arrow(axes, (0.6, 1.0), (2.6, 1.0))
    arrow(axes, (6.0, 1.0), (8.0, 1.0))
    label(axes, 4.3, 3.25, "input_layernorm", family="monospace")
    label(axes, 4.3, 0.15, "input_layernorm.byway.default", family="monospace")
