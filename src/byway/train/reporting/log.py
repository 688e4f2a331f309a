"""metrics.jsonl (one JSON object per step), TensorBoard if requested, and the loss curve as a picture.

Every line is valid JSON: NaN and infinity are written as ``null``, with ``"nonfinite": true`` in the same line.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from byway.core.disk.files import atomic_write_text
from byway.errors import ConfigError, RunError

__all__ = ["Log", "check_tensorboard", "curve_png", "mean_loss_of_last_epoch", "read_metrics"]

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `row` as it is written: NaN and infinity become None, and ``nonfinite: true`` is added."""
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return plain | ({"nonfinite": True} if any(plain[key] is None and row[key] is not None for key in plain) else {})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl up to the first line that is none: a crash truncated the last one."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(cast("dict[str, Any]", row).get("step")) is not int:
            break
        rows.append(cast("dict[str, Any]", row))
    return rows


def check_tensorboard() -> None:
    """Raise ConfigError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError("train.tensorboard is true, but tensorboard is not installed", "pip install 'byway[track]'") from error


class Log:
    """Append to the ``metrics.jsonl`` of a run, flushing each line; ``rows`` holds all rows."""

    def __init__(self, directory: Path, *, after_step: int | None, tensorboard: bool) -> None:
        """`after_step`: keep the existing rows up to this step (a resumed run); None: start empty."""
        self.path = directory / METRICS
        self.rows = [] if after_step is None else [row for row in read_metrics(self.path) if row["step"] <= after_step]
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / TENSORBOARD), purge_step=None if after_step is None else after_step + 1)

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append one row and return it as written."""
        plain = finite(row)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {os.strerror(error.errno or 0)}", "the last checkpoint is intact") from error
        self.rows.append(plain)
        if self._board is not None:
            kind = "eval" if plain.get("eval") else "train"
            for key, value in plain.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
                    self._board.add_scalar(f"{kind}/{key}", value, plain["step"])
        return plain

    def close(self) -> None:
        """Flush TensorBoard's files."""
        if self._board is not None:
            self._board.close()


def mean_loss_of_last_epoch(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean training loss per label over the steps of the last epoch, which may be a part of one."""
    steps = [row for row in rows if not row.get("eval") and row.get("loss") is not None]
    last = max((math.ceil(row["epoch"]) for row in steps), default=0)
    chosen = [row for row in steps if math.ceil(row["epoch"]) == last]
    labels = sum(row["labels"] for row in chosen)
    return sum(row["loss"] * row["labels"] for row in chosen) / labels if labels else None


def curve_png(rows: Sequence[Mapping[str, Any]], *, best_step: int | None = None) -> bytes:
    """Draw the loss over the steps as a PNG: each step, a running mean, evaluations, and the step that was kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [(row["step"], row["loss"]) for row in rows if not row.get("eval") and row.get("loss") is not None]
    evals = [(row["step"], row["loss"]) for row in rows if row.get("eval") and row.get("loss") is not None]
    figure = Figure(figsize=(8, 4.2), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.125, 0.895, 0.845))  # fixed, since computing a layout takes as long as drawing
    if steps:
        x, y = [s for s, _ in steps], [v for _, v in steps]
        smooth = len(steps) > 40
        axes.plot(
            x,
            y,
            color="#9db7d5" if smooth else "#2f6db3",
            linewidth=1.2,
            marker="o" if len(steps) == 1 else "",
            label="training, each step",
        )
        if smooth:
            axes.plot(x, running_mean(y, max(5, len(y) // 20)), color="#2f6db3", linewidth=2, label="training, running mean")
    if evals:
        axes.plot(
            [s for s, _ in evals], [v for _, v in evals], color="#c2571a", linewidth=1.6, marker="o", markersize=4.5, label="evaluation"
        )
    if best_step is not None:
        axes.axvline(best_step, color="#777777", linewidth=1, linestyle=":", label=f"kept: step {best_step}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per label)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps or evals:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last `window` values at each position (fewer at the start)."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]
