"""``engine.checkpointing``: whole layers are recomputed in the backward pass instead of keeping activations."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from byway.engine.backward.checkpointing import checkpointed
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Lever

__all__ = ["Checkpointing", "layers_of"]


@dataclass(frozen=True)
class Checkpointing(Lever):
    """Less memory for more time; the memory plan decides how many layers."""

    key = "checkpointing"
    place = 60
    stage = "planned"

    layers: tuple[str, ...] = ()
    """The layers that are computed again."""

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        return checkpointed(model, self.layers)


def layers_of(engaged: Engaged) -> tuple[str, ...]:
    """The layers that are computed again; none if the lever is off."""
    lever = engaged.find(Checkpointing)
    return () if lever is None else lever.layers
