"""The only file that draws. stdout is data, stderr is talk; everything can be understood without colour, and NO_COLOR is respected.

::

    ui.out(text)                                    one line of data
    ui.table("methods", ["name", "what"], rows)     a table of data: drawn on a terminal, aligned text in a pipe
    ui.note(text)  ui.warn(text)  ui.error(message, hint)  ui.plan_line({"trained": "1.2M"})
    with ui.progress(total, "training") as bar:     a bar on a terminal, a line now and then elsewhere
        bar.update(step, loss=2.31, tokens_per_second=812.0, memory_mb=1200)
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = [
    "Progress",
    "compact",
    "duration",
    "error",
    "is_terminal",
    "marked",
    "note",
    "out",
    "paint",
    "plan_line",
    "progress",
    "table",
    "warn",
]

SECONDS_BETWEEN_LINES = 10.0
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


# ---------------------------------------------------------------- words


def out(text: str = "") -> None:
    """One line of data on stdout."""
    print(text)


def note(text: str) -> None:
    """Talk: what is being done, and where things lie."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something the user should know although the work goes on."""
    print(f"{paint('warning:', 'yellow', sys.stderr)} {text}", file=sys.stderr, flush=True)


def error(message: str, hint: str = "") -> None:
    """``error: ...`` and, on a line of its own, ``hint: ...``."""
    print(f"{paint('error:', 'red', sys.stderr)} {message}", file=sys.stderr)
    if hint:
        print(f"{paint('hint:', 'cyan', sys.stderr)} {hint}", file=sys.stderr, flush=True)


def plan_line(parts: Mapping[str, str]) -> None:
    """What is about to be done, on one line: ``plan: trained 1.2M (0.9%) · steps 40``."""
    note(f"{paint('plan:', 'bold', sys.stderr)} {' · '.join(f'{name} {value}' for name, value in parts.items())}")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person sees `stream` on something that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def paint(text: str, style: str, stream: TextIO) -> str:
    """`text` in a style (bold, dim, red, green, yellow, cyan), if `stream` is a terminal and NO_COLOR is not set."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def compact(number: float) -> str:
    """``950``, ``12.3k``, ``1.2M``, ``3.4B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.99995:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------- tables


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. In a pipe: one line a row, columns aligned, nothing cut off."""
    cells = [[str(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        _draw(title, columns, cells)
        return
    if title:
        out(title)
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        out("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
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


def marked(spans: Sequence[tuple[str, bool, bool]]) -> str:
    """(text, learned, control token) as one text: ⟦learned⟧ and «control»; on a terminal in green and dim, too."""
    shown = []
    for learned, group in groupby(spans, key=lambda span: span[1]):
        words = [(f"«{text}»" if control else text, control) for text, _, control in group]
        if learned:
            shown.append(paint(f"⟦{''.join(text for text, _ in words)}⟧", "green", sys.stdout))
        else:
            shown += [paint(text, "dim", sys.stdout) if control else text for text, control in words]
    return "".join(shown)


# ---------------------------------------------------------------- progress


class Progress(ABC):
    """Work that goes on in steps: ``update`` after each, ``note`` for a line in between."""

    def __init__(self, total: int, what: str, start: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.what = what
        self.start = start
        self.clock = clock
        self.began = clock()

    def update(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None, memory_mb: float | None = None
    ) -> None:
        """`step` steps of `total` are done; the values are of the last one."""
        done = step - self.start
        left = (self.clock() - self.began) / done * (self.total - step) if done > 0 else None
        values = [
            f"loss {loss:.4f}" if loss is not None else "",
            f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second is not None else "",
            f"{memory_mb / 1024:.1f} GB" if memory_mb is not None else "",
            f"{duration(left)} left" if left is not None else "",
        ]
        self.show(step, "  ".join(value for value in values if value))

    @abstractmethod
    def show(self, step: int, values: str) -> None:
        """Draw it."""

    @abstractmethod
    def note(self, text: str) -> None:
        """A line of talk that stays."""


class _Lines(Progress):
    """For logs and pipes: a line now and then, always one for the last step."""

    last_shown = float("-inf")

    def show(self, step: int, values: str) -> None:
        now = self.clock()
        if step < self.total and now - self.last_shown < SECONDS_BETWEEN_LINES:
            return
        self.last_shown = now
        note(f"{self.what} {step}/{self.total}  {values}")

    def note(self, text: str) -> None:
        note(text)


class _Bar(Progress):
    """For a terminal."""

    def __init__(self, total: int, what: str, start: int, clock: Callable[[], float], drawn: RichProgress) -> None:
        super().__init__(total, what, start, clock)
        self.drawn = drawn
        self.task = drawn.add_task(what, total=total, completed=start, values="")

    def show(self, step: int, values: str) -> None:
        self.drawn.update(self.task, completed=step, values=values)

    def note(self, text: str) -> None:
        self.drawn.console.print(text, markup=False, highlight=False)


@contextmanager
def progress(total: int, what: str = "training", *, start: int = 0, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Show how far `total` steps have come, on stderr; `start`: steps that an earlier run had done."""
    if not is_terminal(sys.stderr):
        yield _Lines(total, what, start, clock)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[values]}"))
    with RichProgress(*columns, console=Console(file=sys.stderr)) as drawn:
        yield _Bar(total, what, start, clock, drawn)
