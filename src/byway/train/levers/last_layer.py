"""Whether a run computes the last layer only where it is read: where that saves enough, and a probe gives the plain loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from byway.core.adapter import adapters
from byway.engine.last_layer import last_layer, layers_run, maps_by_row, read_elsewhere
from byway.errors import AdapterError, ConfigError
from byway.tasks.task import Task
from byway.train import randomness
from byway.train.levers.engaged import Engaged, Probe, Reads
from byway.train.levers.prove import reproduces, resting

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["WORTH", "with_reads"]

WORTH = 0.02
"""``auto`` leaves positions out where this share of the layers' work, or more, is saved."""


def with_reads(
    model: nn.Module,
    task: Task[Any],
    examples: Sequence[Any],
    engaged: Engaged,
    probe: Probe,
    wishes: Engine,
    *,
    tokens: float,
    cached: bool,
) -> Engaged:
    """The levers with ``last_layer`` decided.

    Args:
        probe: what they were proved on.
        tokens: of an epoch that are computed, what is shared counted once.
        cached: whether the frozen layers are not run.

    Raises:
        ConfigError: ``engine.last_layer: on``, and it cannot be.
    """
    wish = wishes.last_layer
    reason = "switched off" if wish == "off" else _inapplicable(model, task)
    if not reason:
        layers = layers_run(model, cached=cached)
        for rule, read in _rules(task, examples):
            saved = max(1 - read / tokens, 0.0) / layers
            if wish == "auto" and saved < WORTH:
                reason = f"{saved:.1%} of the layers' work is not worth it"
                break
            reads = Reads(rule)
            with randomness.preserved():
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
    if not (task.language_model or task.read_by_head([])):
        return "which positions a head reads is not known for this task"
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
    padded = reads.marked(task, probe.rows, dict(probe.padded))
    try:
        with resting(model):
            # first without leaving anything out: no tolerance can tell what is not read from what matters little
            missed, of = read_elsewhere(model, lambda: task.loss(model, padded, labels_only=False)[0])
    except AdapterError as error:
        return error.message
    if missed:
        return f"{missed} of {of} positions are read beside the {reads.rule or 'tokens that predict a learned one'}"
    batch = engaged.with_reads(reads, "").batch(task, probe.rows, next(model.parameters()).device)
    with last_layer(model, share=1.0):
        return reproduces(model, probe.padded, batch, engaged.levers, loss=task.loss, plain=probe.plain)
