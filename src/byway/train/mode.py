"""Training mode for a frozen base."""

from __future__ import annotations

from torch import nn

from byway.core.slots import base_modules

__all__ = ["training_mode"]


def training_mode(model: nn.Module) -> None:
    """Set training mode (dropout acts), except for norms with running statistics: a frozen one's must not change."""
    model.train()
    for _, module in base_modules(model):
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
