"""Which of the engine's savings are on in this run, and the contexts that put them into effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from byway.core.adapter import adapters
from byway.data.encode import Example
from byway.engine.attention.packing import packing
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.frontier import frontier
from byway.engine.backward.recompute import SMALLEST, recomputed
from byway.engine.last_layer import last_layer
from byway.engine.shared_prefix import Sharing, share
from byway.tasks.task import Task, moved
from byway.train import randomness
from byway.train.levers.lever import Levers, Measured
from byway.train.levers.prove import plainly, prove

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["Engaged", "Probe", "Reads", "choose"]

PROBE_TOKENS = (16, 24, 32)
"""So many tokens are left of each row of the probe: a run pays for them with two or three forward and backward passes before it begins."""
WINDOW = 160
"""Attention windows up to this length are exceeded by one row of the probe."""


@dataclass(frozen=True)
class Probe:
    """Pieces of a few of the run's own rows, and what they give when they are computed plainly."""

    rows: Sequence[Any]
    padded: Mapping[str, Any]
    plain: Measured
    alike: bool = False
    """Whether two of them begin alike, so that sharing can be tried on them."""


@dataclass(frozen=True)
class Reads:
    """What is read of the last layer's states."""

    rule: str | None
    """Which of :meth:`byway.tasks.Task.read_by_head`; None: the tokens that predict a learned one, which the loss knows by itself."""

    def marked(self, task: Task[Any], examples: Sequence[Any], batch: dict[str, Any]) -> dict[str, Any]:
        """`batch`, with the positions that are read."""
        return batch if self.rule is None else task.reading(examples, self.rule, batch)


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
    reads: Reads | None = None
    """What is read of the last layer, if it is computed only there."""
    why_reads: str = "not asked for"
    """How much that saves, or why it is off."""

    def line(self) -> str:
        """One line for the plan, with a reason for each that is off."""
        count = len(self.checkpointed)
        words = (f"{count} layer{'s' if count > 1 else ''}" if count else "", self.why_checkpointing)
        reason = "; ".join(word for word in words if word)
        shared = f"share_prefix {'off' if self.sharing is None else 'on'} ({self.why_sharing})"
        last = f"last_layer {'off' if self.reads is None else 'on'} ({self.why_reads})"
        return f"{self.levers.line()}, {shared}, {last}, checkpointing {'on' if count else 'off'}{f' ({reason})' if reason else ''}"

    @contextmanager
    def engaged(self, model: nn.Module, *, smallest: int = SMALLEST) -> Iterator[None]:
        """Within this context the levers are in effect; afterwards the model is as it was.

        `smallest`: :func:`~byway.engine.backward.recompute.recomputed`'s.
        """
        with ExitStack() as stack:
            if self.levers.pack:
                stack.enter_context(packing(model))
            if self.levers.frontier:
                stack.enter_context(frontier(model))
            if self.levers.recompute:
                stack.enter_context(recomputed(model, smallest))
            if self.reads is not None:
                stack.enter_context(last_layer(model))
            if self.checkpointed:
                stack.enter_context(checkpointed(model, self.checkpointed))
            yield

    def batch(self, task: Task[Any], examples: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """These examples as one forward takes them."""
        batch = task.collate(examples, packed=self.levers.pack)
        batch = batch if self.sharing is None else share(batch)
        return moved(batch if self.reads is None else self.reads.marked(task, examples, batch), device)

    def tokens(self, task: Task[Any], examples: Sequence[Any]) -> int:
        """How many tokens that forward computes, padding aside."""
        return sum(map(task.length, examples)) if self.sharing is None else Sharing(examples).tokens(range(len(examples)))

    def with_sharing(self, sharing: Sharing | None, why: str) -> Engaged:
        """The same levers, with common heads computed once or not."""
        return replace(self, sharing=sharing, why_sharing=why)

    def with_reads(self, reads: Reads | None, why: str) -> Engaged:
        """The same levers, with the last layer computed where it is read or everywhere."""
        return replace(self, reads=reads, why_reads=why)

    def keeping_all(self, why: str) -> Engaged:
        """The same, with no cheap activation computed again; `why` not."""
        return replace(self, levers=replace(self.levers, recompute=False, reasons={**self.levers.reasons, "recompute": why}))

    def with_checkpointing(self, layers: tuple[str, ...], why: str) -> Engaged:
        """The same levers, with these layers recomputed."""
        return replace(self, checkpointed=layers, why_checkpointing=why)


def choose(model: nn.Module, task: Task[Any], examples: Sequence[Any], wishes: Engine) -> tuple[Engaged, Probe]:
    """(what is on, the probe): the levers that apply and that `wishes` allows are tried on pieces of a few rows.

    Raises:
        ConfigError: a lever that is ``on`` does not stand.
    """
    asked: dict[str, Any] = {
        "pack": wishes.pack,
        "labels_only": wishes.labels_only,
        "frontier": wishes.frontier,
        "recompute": wishes.recompute,
    }
    cannot = _inapplicable(model, task, examples, wishes)
    packs = "pack" not in cannot and wishes.pack != "off"
    alike = _alike(task, examples) if packs and wishes.share_prefix != "off" else []
    rows = probe_rows(task, examples, alike, reach=_reach(model))
    device = next(model.parameters()).device
    padded = moved(task.collate(rows), device)
    packed = moved(task.collate(rows, packed=True), device) if packs else None
    with randomness.preserved():
        probe = Probe(rows, padded, plainly(model, padded, loss=task.loss), bool(alike))
        return Engaged(prove(model, padded, packed, asked, loss=task.loss, cannot=cannot, plain=probe.plain)), probe


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


def _alike(task: Task[Any], examples: Sequence[Any]) -> list[Any]:
    """Two rows of a language model that begin alike, if there are any."""
    if not task.language_model or not all(isinstance(example, Example) for example in examples):
        return []
    return [examples[place] for place in Sharing(examples).closest(2)]


def _reach(model: nn.Module) -> int:
    """How many tokens the narrowest attention window has, if the configuration names one of at most :data:`WINDOW`; else 0."""
    config: Any = model.config
    found = config.get_text_config().to_dict()
    windows = [found.get(name) for name in ("sliding_window", "local_attention", "attention_window", "window_size")]
    return max((width for width in windows if isinstance(width, int) and width <= WINDOW), default=0)


def probe_rows(task: Task[Any], examples: Sequence[Any], alike: Sequence[Any] = (), reach: int = 0) -> list[Any]:
    """Pieces of as many rows as :data:`PROBE_TOKENS`, of different lengths where there are, so that padding and packing make a difference.

    `alike`: rows to take first. `reach`: the longest piece is longer than this.
    """
    labelled = [e for e in examples if task.labels(e) > 0] or list(examples)
    usable = sorted((e for e in labelled if task.length(e) >= 4), key=task.length) or labelled
    spread = [usable[0], usable[-1], usable[len(usable) // 2]]
    chosen = list(alike)
    while len(chosen) < len(PROBE_TOKENS):
        rest = [e for e in spread if all(e is not one for one in chosen)]
        if not rest:
            break
        lengths = {task.length(one) for one in chosen}
        chosen.append(next((e for e in rest if task.length(e) not in lengths), rest[0]))
    room = [*PROBE_TOKENS[:-1], max(PROBE_TOKENS[-1], reach + 8 if reach else 0)][-len(chosen) :]
    return [task.cut(e, tokens) for e, tokens in zip(sorted(chosen, key=task.length), room, strict=True)]
