"""Whether a run computes common heads of rows once: where rows have enough in common, and a probe gives the plain loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from byway.data.encode import Example
from byway.engine.shared_prefix import LEAST, Sharing, share
from byway.errors import ConfigError
from byway.tasks.task import Task, moved
from byway.train import randomness
from byway.train.levers.engaged import Engaged, Probe
from byway.train.levers.prove import reproduces
from byway.train.order import Order

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["WORTH", "with_sharing"]

WORTH = 0.01
"""``auto`` shares where this share of a run's tokens, or more, need not be computed."""


def with_sharing(
    model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, probe: Probe, recipe: Recipe, micro_tokens: int
) -> Engaged:
    """The levers with sharing decided; `probe`: what they were proved on. `micro_tokens`: those of one forward.

    Raises:
        ConfigError: ``engine.share_prefix: on``, and it cannot be.
    """
    wish = recipe.engine.share_prefix
    reason = "switched off" if wish == "off" else _inapplicable(task, examples, engaged, probe)
    if not reason:
        sharing = Sharing(examples)
        lengths = [task.length(e) for e in examples]
        steps = Order(lengths, recipe.train, micro_tokens=micro_tokens, pack=True, sharing=sharing).epoch(0)
        saved = sharing.saved(steps)
        if wish == "auto" and saved < WORTH:
            return engaged.with_sharing(None, f"{saved:.1%} fewer tokens is not worth it")
        reason = _failing(model, task, engaged, probe)
        if not reason:
            return engaged.with_sharing(sharing, f"{sharing.shared_tokens(steps)} tokens, {saved:.1%} fewer")
    if wish == "on":
        raise ConfigError(f"engine.share_prefix is on, but {reason}", "set engine.share_prefix: auto or off")
    return engaged.with_sharing(None, reason)


def _inapplicable(task: Task[Any], examples: Sequence[Any], engaged: Engaged, probe: Probe) -> str:
    """Why nothing can be shared here, or ``""``."""
    if not engaged.levers.pack:
        return "rows are not packed"
    if not task.language_model or not all(isinstance(example, Example) for example in examples):
        return "it is for language models"
    return "" if probe.alike else f"no two rows begin with {LEAST} tokens in common before what is learned"


def _failing(model: nn.Module, task: Task[Any], engaged: Engaged, probe: Probe) -> str:
    """Why the probe's rows with their common heads computed once do not give the plain loss, or ``""``."""
    shared = moved(share(task.collate(probe.rows, packed=True)), next(model.parameters()).device)
    with randomness.preserved():
        return reproduces(model, probe.padded, shared, engaged.levers, loss=task.loss, plain=probe.plain)
