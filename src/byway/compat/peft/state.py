"""What one adapted module remembers for peft's interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from byway.core.copies import TrainedCopy
from byway.core.slots import Slot

__all__ = ["Layer", "finite", "layer_of"]


_STATE = "_byway_peft_layer"


@dataclass
class Layer:
    """What one adapted module remembers for peft's interface."""

    active: list[str] = field(default_factory=list)
    disabled: bool = False
    merged: list[str] = field(default_factory=list)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """The base's own parameters, while merged ones stand in their place."""
    scales: dict[str, float] = field(default_factory=dict)
    """The scale each adapter started with."""

    def apply(self, slot: Slot) -> None:
        """Let exactly those side paths act that peft would let act."""
        there = [name for name, _ in slot.sides()]
        copies = {name for name, side in slot.sides() if isinstance(side, TrainedCopy)}
        acting = () if self.disabled else tuple(name for name in self.active if name in there and (not self.merged or name in copies))
        slot.activate(acting)


def layer_of(module: nn.Module) -> Layer:
    """The record of an adapted module, made when asked for the first time."""
    found = vars(module).get(_STATE)
    if found is None:
        found = vars(module)[_STATE] = Layer()
    return found


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every number is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())
