"""What a lever is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

__all__ = ["Levers", "Loss", "Measured"]


Wish = Literal["auto", "on", "off"]


class Loss(Protocol):
    """A task's loss: the SUM over the labels of a batch, and their number; ``labels_only`` is for language models."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Levers:
    """Which savings are on; `reasons` says why one is off, or what it does not do although it is on."""

    pack: bool = False
    labels_only: bool = False
    frontier: bool = False
    recompute: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the plan: ``pack on, labels_only off (…)``."""
        states = {"pack": self.pack, "labels_only": self.labels_only, "frontier": self.frontier, "recompute": self.recompute}
        why = {name: f" ({self.reasons[name]})" if name in self.reasons else "" for name in states}
        return ", ".join(f"{name} on{why[name]}" if on else f"{name} off{why[name] or ' (not asked for)'}" for name, on in states.items())


@dataclass(frozen=True)
class Measured:
    """What a batch gives: the mean loss over its labels, and the gradients of what is trained (none where nothing is differentiated)."""

    loss: float
    gradients: Mapping[str, Tensor]
