"""Whether a run computes the last layer only where it is read: where that saves enough, and a probe gives the plain loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from byway.core import adapters
from byway.engine.last_layer import last_layer, layers_run, maps_by_row
from byway.engine.probe import reproduces
from byway.errors import AdapterError, ConfigError
from byway.tasks import Task
from byway.train import randomness
from byway.train.levers import Engaged, Probe, Reads

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["WORTH", "with_reads"]

WORTH = 0.02
"""``auto`` leaves positions out where this share of the layers' work, or more, is saved."""


def with_reads(model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, probe: Probe, wishes: Engine) -> Engaged:
    """The levers with ``last_layer`` decided; `probe`: what they were proved on.

    Raises:
        ConfigError: ``engine.last_layer: on``, and it cannot be.
    """
    wish = wishes.last_layer
    reason = "switched off" if wish == "off" else _inapplicable(model, task)
    if not reason:
        layers = layers_run(model, cached=wishes.cache != "off")
        reason = "all that it gives may be read"
        for rule, read in _rules(task, examples):
            saved = (1 - read / sum(map(task.length, examples))) / layers
            if wish == "auto" and saved < WORTH:
                return engaged.with_reads(None, f"{saved:.1%} of the layers' work is not worth it")
            reads = Reads(rule)
            reason = _failing(model, task, engaged, probe, reads)
            if not reason:
                where = "at learned tokens" if rule is None else f"at the {rule}"
                return engaged.with_reads(reads, f"{where}, {saved:.1%} of the layers' work")
    if wish == "on":
        raise ConfigError(f"engine.last_layer is on, but {reason}", "set engine.last_layer: auto or off")
    return engaged.with_reads(None, reason)


def _rules(task: Task[Any], examples: Sequence[Any]) -> list[tuple[str | None, int]]:
    """What may be read, and how many positions of `examples` that are; fewest first."""
    if task.language_model:
        return [(None, sum(map(task.labels, examples)))]
    return [(rule, sum(map(len, places))) for rule, places in task.read_by_head(examples).items()]


def _inapplicable(model: nn.Module, task: Task[Any]) -> str:
    """Why no position can be left out here, or ``""``."""
    alone = [name for name, adapter in adapters(model).items() if not adapter.method.packable]
    if alone:
        return f"the virtual tokens of {alone[0]} stand in rows"
    try:
        maps_by_row(model)
    except AdapterError as error:
        return error.message
    return ""


def _failing(model: nn.Module, task: Task[Any], engaged: Engaged, probe: Probe, reads: Reads) -> str:
    """Why the probe does not give the plain loss with its last layer computed where `reads` says, or ``""``."""
    trial = engaged.with_reads(reads, "")
    batch = trial.batch(task, probe.rows, next(model.parameters()).device)
    with randomness.preserved(), last_layer(model):
        return reproduces(model, probe.padded, batch, engaged.levers, loss=task.loss, plain=probe.plain)
