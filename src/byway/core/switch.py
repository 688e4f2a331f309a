"""Make transformers' method that disables activation checkpointing remove the hook that enabling it added.

Enabling activation checkpointing registers a hook that makes the embedding's output require a gradient, so that
gradients flow through the whole frozen trunk. Disabling it leaves the hook in place: activations of frozen layers are
kept, and a fullgraph compile fails. While an adapter is attached, disabling removes it too, until ``detach``.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["patch", "unpatch"]

_NAMES = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
"""Candidate method names: the first one that the installed transformers defines is patched."""


class _Disable:
    """Instance method: call the class's own method, then remove the embedding's hook. An object, for pickling."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        done = vars(sys.modules["transformers.modeling_utils"].PreTrainedModel)[self.name](model, *args, **kwargs)
        model.disable_input_require_grads()
        return done


def patch(model: nn.Module) -> None:
    """Patch `model`. Does nothing if it is not a transformers model or is patched already."""
    # look only in imported modules: a PreTrainedModel cannot exist unless its module was imported
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return
    name = next(n for n in _NAMES if n in vars(utils.PreTrainedModel))
    if name not in vars(model):
        vars(model)[name] = _Disable(model, name)


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`; a replacement that someone else has set is kept."""
    for name in _NAMES:
        if isinstance(vars(model).get(name), _Disable):
            del vars(model)[name]
