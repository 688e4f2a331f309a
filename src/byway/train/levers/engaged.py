"""The levers that are on in a run, and the contexts that put them into effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from byway.tasks.task import Task, moved
from byway.train.levers.lever import Lever

__all__ = ["Engaged"]

L = TypeVar("L", bound=Lever)


@dataclass(frozen=True)
class Engaged:
    """The levers that passed their test on the probe, in the order in which they act."""

    levers: tuple[Lever, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Key → a remark: why a lever is off, or what it does not do although it is on."""

    def has(self, key: str) -> bool:
        """True if the lever of that key is on."""
        return any(lever.key == key for lever in self.levers)

    def find(self, kind: type[L]) -> L | None:
        """The lever of that class, if it is on."""
        return next((lever for lever in self.levers if isinstance(lever, kind)), None)

    @property
    def packed(self) -> bool:
        """True if rows are packed."""
        return self.has("pack")

    @property
    def labels_only(self) -> bool:
        """True if the output head runs on the tokens in the loss only."""
        return self.has("labels_only")

    def with_lever(self, lever: Lever, words: str | None = None) -> Engaged:
        """The same with `lever` on, in place of one of that key; `words`: a new remark."""
        others = [own for own in self.levers if own.key != lever.key]
        reasons = self.reasons if words is None else {**self.reasons, lever.key: words}
        return replace(self, levers=tuple(sorted([*others, lever], key=lambda own: own.place)), reasons=reasons)

    def without(self, key: str, why: str) -> Engaged:
        """Return a copy with the lever of that key off."""
        return Engaged(tuple(own for own in self.levers if own.key != key), {**self.reasons, key: why})

    def trial(self) -> Engaged:
        """Return a copy with each lever as it is tested on a small probe."""
        return replace(self, levers=tuple(lever.trial() for lever in self.levers))

    def line(self, keys: Sequence[str]) -> str:
        """Return the plan line for the levers `keys`, with the reason for each that is off."""
        parts = []
        for key in dict.fromkeys([*keys, *(lever.key for lever in self.levers)]):
            why = self.reasons.get(key, "" if self.has(key) else "not asked for")
            parts.append(f"{key} {'on' if self.has(key) else 'off'}{f' ({why})' if why else ''}")
        return ", ".join(parts)

    def on_line(self) -> str:
        """Return the levers that are on, with their remarks."""
        words = [(lever.key, self.reasons.get(lever.key, "")) for lever in self.levers]
        return ", ".join(f"{key} ({why})" if why else key for key, why in words)

    @contextmanager
    def engaged(self, model: nn.Module) -> Iterator[None]:
        """Within this context the levers are in effect; afterwards the model is as before."""
        with ExitStack() as stack:
            for lever in self.levers:
                stack.enter_context(lever.on(model))
            yield

    def batch(self, task: Task[Any], examples: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """Return these examples as the batch of one forward pass."""
        batch = task.collate(examples, packed=self.packed)
        for lever in self.levers:
            batch = lever.batch(task, examples, batch)
        return moved(batch, device)
