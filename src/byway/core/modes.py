"""Restore the training or evaluation mode of every module of a model after it was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "modes_restored"]


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """On exit, also after an error, put each module of `model` back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; on exit, restore the mode of each of its modules."""
    with modes_restored(model):
        model.eval()
        yield
