"""All terminal output. Data goes to stdout, everything else to stderr.

Nothing depends on color alone, and NO_COLOR is respected.

::

    ui.out(text)                                    one line of data
    ui.table("methods", ["name", "what"], rows)     a table of data: drawn on a terminal, aligned text in a pipe
    ui.note(text)  ui.warn(text)  ui.error(message, hint)
    with ui.progress(total, "training") as bar:     a bar on a terminal, otherwise a line every 10 seconds
        bar.update(step, loss=2.31, tokens_per_second=812.0, memory_mb=1200)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress", "duration", "error", "is_terminal", "marked", "note", "out", "paint", "progress", "table", "warn"]

SECONDS_BETWEEN_LINES = 10.0
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


# ---------------------------------------------------------------- text


def out(text: str = "") -> None:
    """Print a line of data to stdout."""
    print(text)


def note(text: str) -> None:
    """Print a message to stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr: something the user should know, while the work continues."""
    note(f"{paint('warning:', 'yellow', sys.stderr)} {text}")


def error(message: str, hint: str = "") -> None:
    """Print ``error: ...`` and, if there is a hint, ``hint: ...`` on its own line."""
    note(f"{paint('error:', 'red', sys.stderr)} {message}")
    if hint:
        note(f"{paint('hint:', 'cyan', sys.stderr)} {hint}")


def is_terminal(stream: TextIO) -> bool:
    """True if `stream` is a terminal that supports cursor movement and color."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """Style `text` (bold, dim, red, green, yellow or cyan) if `stream` is a terminal and NO_COLOR is not set."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def marked(spans: Sequence[tuple[str, bool, bool]]) -> str:
    """Join spans of (text, in the loss, control token) into one text.

    Text in the loss is written ⟦like this⟧ and control tokens «like this». A terminal also shows them in green and dim.
    """
    shown = []
    for in_loss, group in groupby(spans, key=lambda span: span[1]):
        words = [(f"«{text}»" if control else text, control) for text, _, control in group]
        if in_loss:
            shown.append(paint(f"⟦{''.join(text for text, _ in words)}⟧", "green", sys.stdout))
        else:
            shown += [paint(text, "dim", sys.stdout) if control else text for text, control in words]
    return "".join(shown)


def duration(seconds: float) -> str:
    """Format seconds as ``0:07``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout. In a pipe: one line per row, columns aligned, nothing truncated."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not is_terminal(sys.stdout):
        if title:
            out(title)
        lines = [list(columns), *cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            out("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout).print(drawn)


# ---------------------------------------------------------------- progress


class Progress:
    """Progress through `total` steps as lines of a log: one every 10 seconds, and always one for the last step."""

    def __init__(self, total: int, what: str, start: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.what = what
        self.start = start
        self.clock = clock
        self.began = clock()
        self.shown_at = float("-inf")

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None, memory_mb: float | None = None
    ) -> None:
        """Report that `step` of `total` steps are done; the values are those of the last one."""
        done = step - self.start
        left = (self.clock() - self.began) / done * (self.total - step) if done > 0 else None
        values = [
            f"loss {loss:.4f}" if loss is not None else "",
            f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second is not None else "",
            f"{memory_mb / 1024:.1f} GB" if memory_mb is not None else "",
            f"{duration(left)} left" if left is not None else "",
        ]
        self._show(step, "  ".join(value for value in values if value))

    def note(self, text: str) -> None:
        """Print a message to stderr, above the bar if there is one."""
        note(text)

    def _show(self, step: int, values: str) -> None:
        now = self.clock()
        if step >= self.total or now - self.shown_at >= SECONDS_BETWEEN_LINES:
            self.shown_at = now
            note(f"{self.what} {step}/{self.total}  {values}")


class _Bar(Progress):
    """Progress as a bar on a terminal."""

    def __init__(self, total: int, what: str, start: int, clock: Callable[[], float], drawn: RichProgress) -> None:
        super().__init__(total, what, start, clock)
        self.drawn = drawn
        self.task = drawn.add_task(what, total=total, completed=start, values="")

    def note(self, text: str) -> None:
        self.drawn.console.print(text, markup=False, highlight=False)

    def _show(self, step: int, values: str) -> None:
        self.drawn.update(self.task, completed=step, values=values)


@contextmanager
def progress(total: int, what: str = "training", *, start: int = 0, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Show progress through `total` steps on stderr. `start`: steps that an earlier run has already done."""
    if not is_terminal(sys.stderr):
        yield Progress(total, what, start, clock)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[values]}"))
    with RichProgress(*columns, console=Console(file=sys.stderr)) as drawn:
        yield _Bar(total, what, start, clock, drawn)
