"""What transformers must know of a model that has an adapter, and only while it has one.

* Enabling activation checkpointing registers a hook that makes the embedding's output require a gradient, so that
  gradients flow through the whole frozen trunk. Disabling it leaves the hook in place: activations of frozen layers are
  kept, and a fullgraph compile fails. Here, disabling removes it too.
* Its ``Trainer`` trains a quantized model only if that is marked as carrying an adapter. The mark also tells
  ``save_pretrained`` to write peft's format with peft's code, so that method is called without it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["patch", "unpatch"]

_DISABLE = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
"""Candidate method names: the first one that the installed transformers defines is patched."""
_SAVE = "save_pretrained"
_MARK = "_hf_peft_config_loaded"


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


class _Save:
    """Instance method: call the class's own method on a model that is not marked."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        del vars(model)[_MARK]
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            vars(model)[_MARK] = True


def patch(model: nn.Module) -> None:
    """Patch `model`. Does nothing if it is not a transformers model or is patched already."""
    # look only in imported modules: a PreTrainedModel cannot exist unless its module was imported
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return
    own = vars(model)
    name = next(n for n in _DISABLE if n in vars(utils.PreTrainedModel))
    if name not in own:
        own[name] = _Disable(model, name)
    if own.get("is_quantized") and not {_MARK, _SAVE} & own.keys():
        own |= {_MARK: True, _SAVE: _Save(model)}


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`; a replacement that someone else has set is kept."""
    own = vars(model)
    for name in _DISABLE:
        if isinstance(own.get(name), _Disable):
            del own[name]
    if isinstance(own.get(_SAVE), _Save):
        del own[_SAVE], own[_MARK]
