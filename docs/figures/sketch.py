"""Boxes and arrows for the pictures: grey is frozen, orange is trained. Each picture is one file here with ``SIZE`` and ``draw(axes)``."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FROZEN, TRAINED, PLAIN, INK = "#dfe5ec", "#f6c177", "white", "#1f2933"


def box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str, size: float = 10) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Any, *points: tuple[float, float]) -> None:
    """A line through `points` with a head at the last."""
    for start, end in pairwise(points[:-1]):
        axes.plot([start[0], end[0]], [start[1], end[1]], color=INK, linewidth=1.2, solid_capstyle="round")
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})


def label(axes: Any, x: float, y: float, text: str, size: float = 9, **options: Any) -> None:
    """Text centred on (x, y); ``style="italic"`` for a quantity, ``family="monospace"`` for a module's name."""
    axes.text(x, y, text, fontsize=size, ha="center", va="center", color=INK, **options)


def plus(axes: Any, x: float, y: float, sign: str = "+") -> None:
    """A small circle with a sign, of radius 0.22."""
    import matplotlib.pyplot as plt

    axes.add_patch(plt.Circle((x, y), 0.22, facecolor=PLAIN, edgecolor=INK))
    axes.text(x, y - 0.02, sign, fontsize=13, ha="center", va="center", color=INK)


def pictures() -> dict[str, Path]:
    """A picture's name → where it is kept: one for each method, and those of the engine."""
    methods = {p.stem: HERE.parent / "methods" / f"{p.stem}.svg" for p in sorted(HERE.glob("*.py")) if p.stem not in ("sketch", "__main__")}
    return methods | {f"engine.{p.stem}": HERE.parent / "performance" / f"{p.stem}.svg" for p in sorted(HERE.glob("engine/*.py"))}


def render(name: str, path: Path) -> None:
    """Draw the picture `name` into the file `path`; the same picture has the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "byway"
    picture = importlib.import_module(name)
    width, height = picture.SIZE
    figure, axes = plt.subplots(figsize=(0.76 * width, 0.76 * height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_aspect("equal")
    axes.axis("off")
    picture.draw(axes)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)
