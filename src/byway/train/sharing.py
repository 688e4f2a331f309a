"""Whether a run computes common heads of rows once: where rows have enough in common, and a probe gives the plain loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from byway.data.encode import Example
from byway.engine.probe import reproduces
from byway.engine.shared_prefix import Sharing, share
from byway.errors import ConfigError
from byway.tasks import Task, moved
from byway.train import randomness
from byway.train.levers import PROBE_ROWS, Engaged
from byway.train.order import Order

if TYPE_CHECKING:
    from byway.recipe import Recipe

__all__ = ["WORTH", "with_sharing"]

WORTH = 0.01
"""``auto`` shares where this share of a run's tokens, or more, need not be computed."""


def with_sharing(
    model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, recipe: Recipe, micro_tokens: int
) -> Engaged:
    """The levers with sharing decided; `micro_tokens`: those of one forward.

    Raises:
        ConfigError: ``engine.share_prefix: on``, and it cannot be.
    """
    wish = recipe.engine.share_prefix
    sharing, reason = (None, "switched off") if wish == "off" else _proved(model, task, examples, engaged)
    if sharing is None:
        if wish == "on":
            raise ConfigError(f"engine.share_prefix is on, but {reason}", "set engine.share_prefix: auto or off")
        return engaged.with_sharing(None, reason)
    lengths = [task.length(e) for e in examples]
    steps = Order(lengths, recipe.train, micro_tokens=micro_tokens, pack=True, sharing=sharing).epoch(0)
    saved = sharing.saved(steps)
    if wish == "auto" and saved < WORTH:
        return engaged.with_sharing(None, f"{saved:.1%} fewer tokens is not worth it")
    return engaged.with_sharing(sharing, f"{sharing.shared_tokens(steps)} tokens, {saved:.1%} fewer")


def _proved(model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged) -> tuple[Sharing | None, str]:
    """(what rows share, ``""``) or (None, why it is not used)."""
    if not engaged.levers.pack:
        return None, "rows are not packed"
    if not task.language_model or not all(isinstance(example, Example) for example in examples):
        return None, "it is for language models"
    sharing = Sharing(examples)
    probe = [examples[i] for i in sharing.closest(PROBE_ROWS)]
    if not probe:
        return None, f"no two rows begin with {sharing.least} tokens in common before what is learned"
    device = next(model.parameters()).device
    padded, shared = moved(task.collate(probe), device), moved(share(task.collate(probe, packed=True)), device)
    with randomness.preserved():
        reason = reproduces(model, padded, shared, engaged.levers, loss=task.loss)
    return (None, reason) if reason else (sharing, "")
