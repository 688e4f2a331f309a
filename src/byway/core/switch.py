"""transformers' switch for activation checkpointing, made to undo what it did.

Switching it on makes the embedding's output require a gradient (a hook), which sends gradients through the whole frozen trunk; switching it
off leaves that hook behind, and then activations of frozen layers are kept and a fullgraph compile fails. While something is attached,
switching off removes the hook as well. ``detach`` takes this away with everything else.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["mend", "unmend"]

_NAMES = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
"""The method that switches off: the first of these that the installed transformers has."""


class _SwitchOff:
    """An instance method that switches off as the class does, then removes the embedding's hook; an object, so that it can be pickled."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        done = vars(sys.modules["transformers.modeling_utils"].PreTrainedModel)[self.name](model, *args, **kwargs)
        model.disable_input_require_grads()
        return done


def mend(model: nn.Module) -> None:
    """Make switching off complete; nothing happens for a model that is none of transformers' or already mended."""
    # asked of modules already imported: nobody can hold a PreTrainedModel without having imported it
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return
    name = next(n for n in _NAMES if n in vars(utils.PreTrainedModel))
    if name not in vars(model):
        vars(model)[name] = _SwitchOff(model, name)


def unmend(model: nn.Module) -> None:
    """Undo :func:`mend`; a replacement that somebody else has set is left alone."""
    for name in _NAMES:
        if isinstance(vars(model).get(name), _SwitchOff):
            del vars(model)[name]
