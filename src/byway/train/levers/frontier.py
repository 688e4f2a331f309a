"""``engine.frontier``: no activations and no gradients below the lowest layer with something to train."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from byway.engine.backward.frontier import frontier
from byway.train.levers.lever import Lever

__all__ = ["Frontier"]


class Frontier(Lever):
    """The backward pass ends at the lowest trainable layer."""

    key = "frontier"
    place = 20

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        return frontier(model)
