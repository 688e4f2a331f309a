"""``state.json`` of a checkpoint, read strictly, and whether a state is one that the run can be in.

A seal shows that files are as they were written, not that they go together: another program, another version or a hand
may have written and sealed them. So everything is checked where it is read, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    from torch import Tensor

    from byway.train.order import Order

__all__ = ["Essentials", "Progress", "Scaling", "State", "check_possible", "differences"]

Number = Annotated[int, Ge(0), Le(2**53)]


@dataclass(frozen=True, kw_only=True)
class State:
    """The parts of the file."""

    format: int
    progress: Mapping[str, Any]
    essentials: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    random: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Essentials:
    """What must not change when the run is resumed (``train/essentials.py``)."""

    recipe: Mapping[str, Any]
    rows: Mapping[str, str]
    base: Mapping[str, Any]
    cache: str = "off"
    memory: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What the optimizer keeps besides tensors."""

    scaler: Mapping[str, Annotated[float, Ge(0)]]
    """The loss scale of float16, empty for other dtypes."""


@dataclass
class Progress:
    """The progress of a run."""

    step: Number = 0
    """Optimizer steps done, including skipped ones."""
    epoch: Number = 0
    position: Number = 0
    """Steps done in this epoch."""
    tokens: Number = 0
    labels: Number = 0
    seconds: Annotated[float, Ge(0)] = 0.0
    evaluated: Number = 0
    """The step of the last evaluation."""
    best_step: Number | None = None
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation."""
    stale: Number = 0
    """Evaluations since the best one."""
    skipped: Number = 0
    """Steps without an update because a gradient was not finite."""
    skipped_in_a_row: Number = 0


def check_possible(progress: Progress, order: Order, criterion: str, *, has_best: bool, where: str) -> None:
    """Check that a run with these steps can be in this state.

    Args:
        progress: read from the checkpoint `where`.
        order: the run's steps.
        criterion: the metric by which evaluations are compared.
        has_best: the checkpoint holds the adapter of an earlier, better evaluation.

    Raises:
        ConfigError: with every contradiction found.
    """
    problems = list(_contradictions(progress, order, criterion, has_best))
    if problems:
        raise ConfigError(f"{where} contradicts itself or the rows: {'; '.join(problems)}", "resume from an older checkpoint")


def _contradictions(progress: Progress, order: Order, criterion: str, has_best: bool) -> Iterator[str]:
    step, best = progress.step, progress.best_step
    steps = order.epoch(progress.epoch)
    before = sum(order.lengths[i] for s in steps[: progress.position] for micro in s for i in micro)
    if progress.position > len(steps):
        yield f"position is {progress.position:,}, but an epoch has {len(steps):,} steps"
    elif progress.tokens != progress.epoch * sum(order.lengths) + before:  # so epoch is small enough to count its steps
        yield f"{progress.tokens:,} tokens are not those of {progress.epoch:,} epochs and {progress.position:,} steps"
    elif step != order.steps_before(progress.epoch) + progress.position:
        yield f"step is {step:,}, but {progress.epoch:,} epochs and {progress.position:,} steps are done"
    for name in ("evaluated", "stale", "skipped", "skipped_in_a_row"):
        if vars(progress)[name] > step:
            yield f"{name} is {vars(progress)[name]:,} at step {step:,}"
    if best is None and (progress.best or has_best):
        yield "there is a best evaluation, but no best_step"
    if best is not None:
        if not 0 < best <= progress.evaluated:
            yield f"best_step is {best:,}, but the last evaluation was at step {progress.evaluated:,}"
        if missing := {criterion, "loss"} - progress.best.keys():
            yield f"the best evaluation has no {listed(missing)}"
        if best != step and not has_best:
            yield f"the adapter of the best evaluation, at step {best:,}, is missing"


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Say how the names, shapes and dtypes of `given` differ from those of `own`."""
    problems = [f"{name} is missing" for name in own.keys() - given.keys()]
    problems += [f"{name} is unknown" for name in given.keys() - own.keys()]
    return problems + [
        f"{name} is {tuple(given[name].shape)} {given[name].dtype}, expected {tuple(mine.shape)} {mine.dtype}"
        for name, mine in own.items()
        if name in given and (given[name].shape != mine.shape or given[name].dtype != mine.dtype)
    ]
