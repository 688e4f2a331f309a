"""Events of a run. The loop prints nothing: the command line draws these, a notebook may, tests collect them."""

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
    """Base class of all events."""


@dataclass(frozen=True)
class Note(Event):
    """Something the user should know, in one sentence."""

    text: str


@dataclass(frozen=True)
class Planned(Event):
    """All checks passed; nothing is written yet. ``step``: the step the run continues from (0: a new run)."""

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
    """An evaluation is done. ``best``: True if it is the best so far."""

    row: Mapping[str, Any]
    best: bool


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is complete on disk."""

    path: Path
    step: int


@dataclass(frozen=True)
class Stopping(Event):
    """A signal arrived: the run finishes this step, writes a checkpoint and ends."""

    signal: str


@dataclass(frozen=True)
class Finished(Event):
    """The run is finished and its files are written."""

    directory: Path
    metrics: Mapping[str, Any]


Observer = Callable[[Event], None]
"""Called with each event in the training thread; an exception from it ends the run."""
