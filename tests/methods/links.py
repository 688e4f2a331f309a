"""Links of one's own, for the tests of weight chains: importable, as a recipe wants them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Columns(nn.Module):
    """W ↦ W·diag(1 + g), g (columns,) from zero."""

    def __init__(self, weight: Tensor, start: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((weight.shape[1],), start, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.gain)


class Flat(nn.Module):
    """No link: it changes the shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten()


def a_function(weight: Tensor) -> Tensor:
    """Not an nn.Module."""
    return weight
