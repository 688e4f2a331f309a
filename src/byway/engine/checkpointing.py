"""Activation checkpointing, layer by layer: a layer's activations are computed again in the backward pass instead of being kept.

Set on the layers themselves and not by transformers' switch, whose embedding hook sends gradients through the whole frozen trunk and stays
after the switch is turned off.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from byway.errors import ConfigError
from byway.families import facts

__all__ = ["checkpointed"]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[int]:
    """Within this context every layer is recomputed in the backward pass (training mode only); yields how many layers that are.

    Raises:
        ConfigError: the model's layers are none of transformers' checkpointing layers.
    """
    layers = [model.get_submodule(path) for stack in facts(model).require("stacks").values() for path in stack]
    layers = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"the layers of {type(model).__name__} cannot be recomputed one by one", "set engine.checkpointing: off")
    before = [{key: vars(layer)[key] for key in _OWN if key in vars(layer)} for layer in layers]
    for layer in layers:
        vars(layer).update(zip(_OWN, (True, functools.partial(checkpoint, use_reentrant=False)), strict=True))
    try:
        yield len(layers)
    finally:
        for layer, own in zip(layers, before, strict=True):
            for key in _OWN:
                vars(layer).pop(key, None)
            vars(layer).update(own)


_OWN = ("gradient_checkpointing", "_gradient_checkpointing_func")
