"""``engine.last_layer``: the last layer runs only at the positions whose output is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from byway.core.adapter import adapters
from byway.engine.last_layer import last_layer, layers_run, maps_by_row, read_elsewhere
from byway.errors import AdapterError
from byway.tasks.task import Task
from byway.train.levers.lever import Lever, On, Saving, Setting
from byway.train.levers.prove import resting

__all__ = ["LastLayer"]


@dataclass(frozen=True)
class LastLayer(Lever):
    """The last layer skips positions that no head reads: all but one per row in a classifier, unlabelled tokens."""

    key = "last_layer"
    place = 50
    stage = "last"
    worth = 0.02

    rule: str | None = None
    """Which of :meth:`byway.tasks.task.Task.read_by_head`; None: tokens that predict one in the loss, known to it."""
    share: float | None = None
    """Share of positions up to which skipping the rest pays; None: the default of :mod:`byway.engine.last_layer`."""

    def cannot(self, setting: Setting, on: On) -> str:
        if not (setting.task.language_model or setting.task.read_by_head([])):
            return "it is not known which positions a head of this task reads"
        alone = [name for name, adapter in adapters(setting.model).items() if not adapter.method.packable]
        if alone:
            return f"the virtual tokens of {alone[0]} are inside the rows"
        try:
            maps_by_row(setting.model)
        except AdapterError as error:
            return error.message
        return ""

    def savings(self, setting: Setting, on: On) -> Iterator[Saving]:
        layers = layers_run(setting.model, cached=setting.cached)
        for rule, read in positions_read(setting.task, setting.examples):
            saved = max(1 - read / setting.tokens, 0.0) / layers
            where = "at tokens that predict one in the loss" if rule is None else f"at the {rule}"
            yield Saving(LastLayer(rule), saved, "of the layers' work", f"{where}, {saved:.1%} of the layers' work")

    def fails(self, setting: Setting) -> str:
        """Check exactly that nothing else is read: no tolerance can tell what is not read from what matters little."""
        padded = self.batch(setting.task, setting.probe.rows, dict(setting.probe.padded))
        try:
            with resting(setting.model):
                missed, of = read_elsewhere(setting.model, lambda: setting.task.loss(setting.model, padded, labels_only=False)[0])
        except AdapterError as error:
            return error.message
        return f"{missed} of {of} positions are read besides the {self.rule or 'tokens that predict one in the loss'}" if missed else ""

    def trial(self) -> Lever:
        return replace(self, share=1.0)

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        return last_layer(model) if self.share is None else last_layer(model, share=self.share)

    def batch(self, task: Task[Any], examples: Sequence[Any], batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.rule is None else task.reading(examples, self.rule, batch)


def positions_read(task: Task[Any], examples: Sequence[Any]) -> list[tuple[str | None, int]]:
    """The rules that may hold, each with the number of positions of `examples` that it reads; fewest first."""
    if task.language_model:
        return [(None, sum(map(task.labels, examples)))]
    return [(rule, sum(map(len, places))) for rule, places in task.read_by_head(examples).items()]
