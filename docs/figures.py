"""Draw the pictures of the documentation: ``python docs/figures.py`` writes them beside the pages that show them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FROZEN, TRAINED, INK = "#dfe5ec", "#f6c177", "#1f2933"


def _box(axes: Any, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)


def _arrow(axes: Any, *points: tuple[float, float]) -> None:
    for start, end in pairwise(points[:-1]):
        axes.plot([start[0], end[0]], [start[1], end[1]], color=INK, linewidth=1.2, solid_capstyle="round")
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})


def lora(path: Path) -> None:
    """Where LoRA's side path hangs on a linear map, and the shapes of its factors."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "byway"  # the same picture has the same bytes
    figure, axes = plt.subplots(figsize=(7.6, 3.1))
    axes.set(xlim=(0, 10), ylim=(0, 4.1))
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(0.35, 2.85, "x", fontsize=13, ha="center", va="center", style="italic", color=INK)
    axes.text(0.35, 2.45, "(…, in)", fontsize=8, ha="center", va="center", color=INK)
    _box(axes, 2.3, 2.3, 4.6, 1.2, FROZEN, "W  (out, in)\nfrozen, untouched")
    _box(axes, 1.75, 0.5, 1.1, 0.8, "white", "dropout")
    _box(axes, 3.35, 0.5, 1.4, 0.8, TRAINED, "A  (r, in)")
    _box(axes, 5.25, 0.5, 1.4, 0.8, TRAINED, "B  (out, r)")
    _box(axes, 7.15, 0.5, 0.7, 0.8, "white", "·s")
    axes.add_patch(plt.Circle((8.4, 2.9), 0.22, facecolor="white", edgecolor=INK))
    axes.text(8.4, 2.88, "+", fontsize=13, ha="center", va="center", color=INK)
    axes.text(9.65, 2.85, "y", fontsize=13, ha="center", va="center", style="italic", color=INK)
    axes.text(9.65, 2.45, "(…, out)", fontsize=8, ha="center", va="center", color=INK)
    _arrow(axes, (0.55, 2.9), (2.3, 2.9))
    _arrow(axes, (6.9, 2.9), (8.18, 2.9))
    _arrow(axes, (8.62, 2.9), (9.45, 2.9))
    _arrow(axes, (1.2, 2.9), (1.2, 0.9), (1.75, 0.9))
    for start, end in ((2.85, 3.35), (4.75, 5.25), (6.65, 7.15)):
        _arrow(axes, (start, 0.9), (end, 0.9))
    _arrow(axes, (7.85, 0.9), (8.4, 0.9), (8.4, 2.68))
    axes.text(4.6, 3.75, "q_proj", fontsize=9, family="monospace", ha="center", color=INK)
    axes.text(4.6, 1.5, "q_proj.byway.default", fontsize=9, family="monospace", ha="center", color=INK)
    axes.text(4.6, 0.12, "the side path: r·(in + out) trained numbers", fontsize=9, ha="center", va="center", color=INK)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


FIGURES = {"methods/lora.svg": lora}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        draw(HERE / name)
        print(HERE / name)
