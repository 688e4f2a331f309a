"""The frozen-trunk cache of a run: whether to use one, tested on the probe, and how steps and evaluations read it.

Whether a run reads its states from a cache follows from the recipe, the base and the rows, and is recorded in each
checkpoint. What is on disk only decides what must be computed again. So a resumed run is bit-identical to the
uninterrupted one, whether the cache still exists or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from byway.base.arithmetic.int8 import exact_products
from byway.core.disk.caches import cache_root
from byway.engine.cache import Kept, TrunkCache, shortcuts
from byway.engine.cache.survey import Survey, computing, survey
from byway.engine.shared_prefix import KEY, segments
from byway.errors import AdapterError, BywayError, ConfigError
from byway.tasks.task import Rows, Task, moved
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Measured
from byway.train.levers.prove import TOLERANCE, apart, measured

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["Caching", "plan_cache"]

OFF = "off"
_SAME_STATES = 1e-5
"""Largest relative difference of loss and gradients if both read the same states."""


@dataclass(frozen=True)
class Caching:
    """The caches of a run."""

    kept: str = OFF
    """How states are stored, or ``off``; recorded in checkpoints."""
    line: str = "cache off"
    train: TrunkCache | None = None
    evaluation: TrunkCache | None = None
    collate: Callable[[Sequence[int]], Mapping[str, Any]] | None = field(default=None, repr=False)
    """Training rows by index, as one packed batch without shared prefixes."""

    @contextmanager
    def opened(self, note: Callable[[str], None]) -> Iterator[None]:
        """Within this context the stores are marked as in use; one unit of each is recomputed and compared."""
        caches = [cache for cache in (self.train, self.evaluation) if cache is not None]
        try:
            for cache in caches:
                cache.note = note
                text = cache.spot_check()
                if text:
                    note(text)
            yield
        finally:
            for cache in caches:
                cache.close()

    def micro(self, indices: Sequence[int], batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context for the forward pass of these training rows."""
        if self.train is None:
            return nullcontext()
        if KEY not in batch or self.collate is None:
            return self.train.replay(indices)
        return self.train.replay(indices, [(s.document, s.begin, s.end) for s in segments(self.collate(indices))])

    def evaluating(self, indices: Sequence[int]) -> AbstractContextManager[None]:
        """Return the context for the forward pass of these held-out rows."""
        return nullcontext() if self.evaluation is None else self.evaluation.replay(indices)


@dataclass(frozen=True)
class _Choice:
    """A shortcut and the positions that are stored: all (None), or a rule of
    :meth:`byway.tasks.task.Task.read_by_head`."""

    known: Survey
    rule: str | None

    def kept(self, task: Task[Any], examples: Sequence[Any]) -> list[tuple[int, ...]] | None:
        return None if self.rule is None else task.read_by_head(examples)[self.rule]

    @property
    def where(self) -> str:
        shortcut = self.known.shortcut
        return shortcut.where + (f", {self.rule} only" if self.rule is not None else "")


def plan_cache(
    model: nn.Module,
    task: Task[Any],
    rows: Rows[Any],
    engaged: Engaged,
    probe: Sequence[Any],
    wishes: Engine,
    *,
    steps: tuple[int, int],
    recorded: str | None,
) -> Caching:
    """Decide what the run reads from a cache; nothing is written.

    Args:
        steps: (steps of the run, steps of one epoch).
        recorded: the setting in the checkpoint that is resumed, which ``auto`` follows.

    Raises:
        ConfigError: a directory is named, or the checkpoint was made with a cache, and nothing can be cached.
    """
    if wishes.cache == "off":
        return Caching()
    wanted = wishes.cache != "auto" or recorded not in (None, OFF)
    if wishes.cache == "auto" and recorded == OFF:
        return Caching(line="cache off (as in the checkpoint)")
    if not wanted and steps[0] < steps[1]:
        return Caching(line="cache off (the run is shorter than one epoch)")
    try:
        with engaged.engaged(model), exact_products(model):  # 8-bit rounding would amplify another order of summation
            choice, note = _proved(model, task, engaged, probe, wishes)
        caching = _made(model, task, rows, engaged, wishes, choice, note)
        for cache in (caching.train, caching.evaluation):
            reason = "" if cache is None else cache.problem()
            if reason:
                raise AdapterError(reason)
    except BywayError as error:
        if not wanted:
            return Caching(line=f"cache off ({error.message})")
        said = f"engine.cache is {wishes.cache}" if wishes.cache != "auto" else "the checkpoint was made with engine.cache: auto"
        raise ConfigError(f"{said}, but {error.message}", "set engine.cache: off, or train above a frozen part only") from error
    return caching


def _made(model: nn.Module, task: Task[Any], rows: Rows[Any], engaged: Engaged, wishes: Engine, choice: _Choice, note: str) -> Caching:
    root = cache_root() / "trunk" if wishes.cache == "auto" else Path(wishes.cache).expanduser()

    def cache_of(examples: Sequence[Any]) -> TrunkCache | None:
        if not examples:
            return None
        return TrunkCache(
            model,
            _collate(task, examples, engaged),
            [task.length(example) for example in examples],
            root=root,
            kept=choice.kept(task, examples),
            dtype=wishes.cache_dtype,
            limit_gb=wishes.cache_limit_gb,
            known=choice.known,
        )

    train, evaluation = cache_of(rows.train), cache_of(rows.evaluation)
    assert train is not None
    total = train.bytes + (evaluation.bytes if evaluation is not None else 0)
    line = f"cache on ({choice.where}, {_bytes(train.bytes_per_token)} a token, {_bytes(total)}{note})"
    return Caching(wishes.cache_dtype, line, train, evaluation, _collate(task, rows.train, engaged))


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2g} {unit}" if count < 10 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"


def _collate(task: Task[Any], examples: Sequence[Any], engaged: Engaged) -> Callable[[Sequence[int]], dict[str, Any]]:
    """Return how the cache batches rows: packed for a language model that can be, else padded, grouped by length."""
    pack = engaged.packed and task.language_model
    return lambda indices: task.collate([examples[i] for i in indices], packed=pack)


# ---------------------------------------------------------------- the proof


def _proved(model: nn.Module, task: Task[Any], engaged: Engaged, probe: Sequence[Any], wishes: Engine) -> tuple[_Choice, str]:
    """Return the cheapest way that reproduces loss and gradients on the probe, and the error of an approximation."""
    device = next(model.parameters()).device
    collate = _collate(task, probe, engaged)
    lengths = [task.length(example) for example in probe]

    def cache_of(way: _Choice, dtype: Kept = "same") -> TrunkCache:
        return TrunkCache(model, collate, lengths, kept=way.kept(task, probe), known=way.known, dtype=dtype)

    def compute(cache: TrunkCache | None) -> Measured:
        batch = moved(task.collate(list(probe), packed=engaged.packed), device)
        around = nullcontext() if cache is None else cache.replay(range(len(probe)))
        with computing(model), torch.enable_grad(), around:
            return measured(model, task.loss, batch, labels_only=engaged.labels_only)

    live = compute(None)
    first = min(range(len(probe)), key=lambda i: lengths[i])
    inputs = {k: v for k, v in moved(collate([first]), device).items() if k != "labels"}
    ways: list[_Choice] = []  # the one that stores least first
    for shortcut in shortcuts(model):
        known = survey(model, shortcut, inputs)
        ways += [_Choice(known, rule) for rule in (*(task.read_by_head(probe) if shortcut.head_only else ()), None)]
    full = compute(cache_of(ways[-1]))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    off = apart(full, live)
    if max(off) > TOLERANCE[dtype]:
        raise AdapterError(f"it does not reproduce the plain loss here (loss off by {off[0]:.1e}, gradients by {off[1]:.1e})")
    same = (way for way in ways[:-1] if max(apart(compute(cache_of(way)), full)) <= _SAME_STATES)
    way = next(same, ways[-1])
    if wishes.cache_dtype == "same":
        return way, ""
    rough = cache_of(way, wishes.cache_dtype)
    loss = compute(rough).loss - live.loss
    return way, f", as {wishes.cache_dtype}: states off by {rough.error(range(len(probe))):.2%}, loss by {loss:+.1e}"
