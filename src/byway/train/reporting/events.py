"""What a run tells whoever watches it. The loop prints nothing; the command line draws these, a notebook may, a test collects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byway.train.plan.plan import Plan

__all__ = ["Evaluated", "Evaluating", "Event", "Finished", "Note", "Observer", "Planned", "Saved", "Stepped", "Stopping"]


@dataclass(frozen=True)
class Event:
    """Anything that happens in a run."""


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know, in one sentence."""

    text: str


@dataclass(frozen=True)
class Planned(Event):
    """All checks have passed; nothing has been written yet. ``step``: the step from which the run goes on (0: from the start)."""

    plan: Plan
    step: int = 0


@dataclass(frozen=True)
class Stepped(Event):
    """One optimizer step is done. ``row``: its line in metrics.jsonl."""

    row: Mapping[str, Any]
    total: int


@dataclass(frozen=True)
class Evaluating(Event):
    """`done` of `total` evaluation batches."""

    done: int
    total: int


@dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation is done. ``best``: whether it is the best so far."""

    row: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete on the disk."""

    path: Path
    step: int


@dataclass(frozen=True)
class Stopping(Event):
    """A signal has come: this step is finished, a checkpoint written, then the run ends."""

    signal: str


@dataclass(frozen=True)
class Finished(Event):
    """The run has ended well and its files are written."""

    directory: Path
    metrics: Mapping[str, Any]


Observer = Callable[[Event], None]
"""Called with each event, in the thread that trains; what it raises ends the run."""
