"""The mode in which a model is trained."""

from __future__ import annotations

from torch import nn

from byway.core.slots import base_modules

__all__ = ["training_mode"]


def training_mode(model: nn.Module) -> None:
    """Dropout acts; the running statistics of a frozen batch norm stay what they are."""
    model.train()
    for _, module in base_modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
