"""Which of the engine's savings are on in this run, and the contexts that put them into effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core import adapters
from byway.engine.attention import packing
from byway.engine.checkpointing import checkpointed
from byway.engine.frontier import frontier
from byway.engine.probe import Levers, prove
from byway.errors import ConfigError, TargetError
from byway.tasks import Task, moved
from byway.train import randomness

if TYPE_CHECKING:
    from byway.recipe.sections import Engine

__all__ = ["Engaged", "choose", "saved_bytes"]

PROBE_ROWS = 3
PROBE_TOKENS = 512


@dataclass(frozen=True)
class Engaged:
    """The levers that proved themselves, and whether layers are recomputed."""

    levers: Levers = field(default_factory=Levers)
    checkpointing: bool = False
    why_checkpointing: str = ""

    def line(self) -> str:
        """One line for the plan, with a reason for each that is off."""
        state = "on" if self.checkpointing else "off"
        reason = f" ({self.why_checkpointing})" if self.why_checkpointing else ""
        return f"{self.levers.line()}, checkpointing {state}{reason}"

    @contextmanager
    def engaged(self, model: nn.Module) -> Iterator[None]:
        """Within this context the levers are in effect; afterwards the model is as it was."""
        with ExitStack() as stack:
            if self.levers.pack:
                stack.enter_context(packing(model))
            if self.levers.frontier:
                stack.enter_context(frontier(model))
            if self.checkpointing:
                stack.enter_context(checkpointed(model))
            yield

    def with_checkpointing(self, on: bool, why: str) -> Engaged:
        """The same levers, with layers recomputed or not."""
        return replace(self, checkpointing=on, why_checkpointing=why)


def choose(model: nn.Module, task: Task[Any], examples: Sequence[Any], wishes: Engine) -> tuple[Engaged, list[Any]]:
    """(what is on, the probe's examples): each lever that `wishes` allows is tried on a few short rows.

    Raises:
        ConfigError: a lever that is ``on`` does not stand.
    """
    probe = probe_examples(task, examples)
    asked: dict[str, Any] = {"pack": wishes.pack, "labels_only": wishes.labels_only, "frontier": wishes.frontier}
    if not task.language_model:
        on = [name for name, wish in asked.items() if wish == "on"]
        if on:
            raise ConfigError(f"engine.{on[0]} is on, but it is for language models", f"set engine.{on[0]}: auto or off")
        return Engaged(Levers(reasons=dict.fromkeys(asked, "for language models"))), probe
    device = next(model.parameters()).device
    padded = moved(task.collate(probe), device)
    unpacked = [name for name, adapter in adapters(model).items() if not adapter.method.packable]
    if unpacked and wishes.pack == "on":
        raise ConfigError(f"engine.pack is on, but {unpacked[0]} cannot be packed", "set engine.pack: auto or off")
    packed = None if unpacked else moved(task.collate(probe, packed=True), device)
    with randomness.preserved():
        return Engaged(prove(model, padded, packed, asked)), probe


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


def can_checkpoint(model: nn.Module) -> str:
    """Why the layers cannot be recomputed one by one, or ``""``."""
    try:
        with checkpointed(model):
            return ""
    except (ConfigError, TargetError) as error:
        return error.message


def saved_bytes(model: nn.Module, task: Task[Any], batch: Mapping[str, Any], *, labels_only: bool) -> int:
    """How much one forward of `batch` keeps for the backward pass: every saved tensor's storage once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with randomness.preserved(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = task.loss(model, batch, labels_only=labels_only)
    del loss  # until here the graph keeps the storages, so that no address is counted for two
    return sum(kept.values())
