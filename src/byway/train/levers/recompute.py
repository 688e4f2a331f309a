"""``engine.recompute``: norms and activation functions are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from byway.engine.backward.recompute import SMALLEST, recomputed
from byway.train.levers.lever import Lever

__all__ = ["Recompute"]


@dataclass(frozen=True)
class Recompute(Lever):
    """Cheap activations are not kept."""

    key = "recompute"
    place = 30

    smallest: int = SMALLEST
    """Tensors with fewer elements are kept (:func:`~byway.engine.backward.recompute.recomputed`)."""

    def trial(self) -> Lever:
        return replace(self, smallest=1)

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        return recomputed(model, self.smallest)
