"""Which of the engine's savings are on in this run, and the contexts that put them into effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from byway.core import adapters
from byway.engine.attention import packing
from byway.engine.checkpointing import checkpointed
from byway.engine.frontier import frontier
from byway.engine.probe import Levers, prove
from byway.engine.recompute import recomputed
from byway.engine.shared_prefix import Sharing, share
from byway.tasks import Task, moved
from byway.train import randomness

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["Engaged", "choose"]

PROBE_ROWS = 3
PROBE_TOKENS = 160
"""Rows of the probe are short where there are short ones: each lever costs a forward and a backward pass over them before the run."""


@dataclass(frozen=True)
class Engaged:
    """The levers that proved themselves, and which layers are recomputed."""

    levers: Levers = field(default_factory=Levers)
    checkpointed: tuple[str, ...] = ()
    """The layers that are recomputed in the backward pass."""
    why_checkpointing: str = ""
    sharing: Sharing | None = None
    """What rows begin with in common, if that is computed once."""
    why_sharing: str = "not asked for"
    """How much that saves, or why it is off."""

    def line(self) -> str:
        """One line for the plan, with a reason for each that is off."""
        count = len(self.checkpointed)
        words = (f"{count} layer{'s' if count > 1 else ''}" if count else "", self.why_checkpointing)
        reason = "; ".join(word for word in words if word)
        shared = f"share_prefix {'off' if self.sharing is None else 'on'} ({self.why_sharing})"
        return f"{self.levers.line()}, {shared}, checkpointing {'on' if count else 'off'}{f' ({reason})' if reason else ''}"

    @contextmanager
    def engaged(self, model: nn.Module) -> Iterator[None]:
        """Within this context the levers are in effect; afterwards the model is as it was."""
        with ExitStack() as stack:
            if self.levers.pack:
                stack.enter_context(packing(model))
            if self.levers.frontier:
                stack.enter_context(frontier(model))
            if self.levers.recompute:
                stack.enter_context(recomputed(model))
            if self.checkpointed:
                stack.enter_context(checkpointed(model, self.checkpointed))
            yield

    def batch(self, task: Task[Any], examples: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """These examples as one forward takes them."""
        batch = task.collate(examples, packed=self.levers.pack)
        return moved(batch if self.sharing is None else share(batch), device)

    def tokens(self, task: Task[Any], examples: Sequence[Any]) -> int:
        """How many tokens that forward computes, padding aside."""
        return sum(map(task.length, examples)) if self.sharing is None else Sharing(examples).tokens(range(len(examples)))

    def with_sharing(self, sharing: Sharing | None, why: str) -> Engaged:
        """The same levers, with common heads computed once or not."""
        return replace(self, sharing=sharing, why_sharing=why)

    def with_checkpointing(self, layers: tuple[str, ...], why: str) -> Engaged:
        """The same levers, with these layers recomputed."""
        return replace(self, checkpointed=layers, why_checkpointing=why)


def choose(model: nn.Module, task: Task[Any], examples: Sequence[Any], wishes: Engine) -> tuple[Engaged, list[Any]]:
    """(what is on, the probe's examples): each lever that applies and that `wishes` allows is tried on a few short rows.

    Raises:
        ConfigError: a lever that is ``on`` does not stand.
    """
    probe = probe_examples(task, examples)
    asked: dict[str, Any] = {
        "pack": wishes.pack,
        "labels_only": wishes.labels_only,
        "frontier": wishes.frontier,
        "recompute": wishes.recompute,
    }
    cannot = _inapplicable(model, task, examples, wishes)
    device = next(model.parameters()).device
    padded = moved(task.collate(probe), device)
    packed = None if "pack" in cannot or wishes.pack == "off" else moved(task.collate(probe, packed=True), device)
    with randomness.preserved():
        return Engaged(prove(model, padded, packed, asked, loss=task.loss, cannot=cannot)), probe


def _inapplicable(model: nn.Module, task: Task[Any], examples: Sequence[Any], wishes: Engine) -> dict[str, str]:
    """Lever → why it is not tried for this task, these methods or these rows."""
    found: dict[str, str] = {}
    if not task.language_model:
        found["labels_only"] = "it is for language models: here the head runs once a row"
    alone = [name for name, adapter in adapters(model).items() if not adapter.method.packable]
    if alone:
        found["pack"] = f"{alone[0]} cannot be packed: its virtual tokens stand in rows"
    elif wishes.pack == "auto" and wishes.share_prefix != "on" and len({task.length(e) for e in examples}) == 1:
        found["pack"] = "all rows are of one length, so there is no padding"
    return found


def probe_examples(task: Task[Any], examples: Sequence[Any]) -> list[Any]:
    """A few short examples of different lengths, so that padding and packing make a difference."""
    by_length = sorted((e for e in examples if task.labels(e) > 0), key=task.length)
    first = [e for e in by_length if task.length(e) >= 4][:1] or by_length[:1]
    longer = [e for e in by_length if first and task.length(first[0]) < task.length(e) <= PROBE_TOKENS]
    picked = [longer[len(longer) * part // PROBE_ROWS] for part in range(1, PROBE_ROWS)] if longer else by_length[1:PROBE_ROWS]
    chosen: list[Any] = []
    room = 2 * PROBE_TOKENS
    for example in [*first, *picked]:
        fits = task.length(example) <= room or not chosen
        if fits and not any(example is one for one in chosen):
            chosen.append(example)
            room -= task.length(example)
    return chosen
