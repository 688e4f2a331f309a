"""Gradient checkpointing layer by layer: activations are recomputed in the backward pass instead of kept.

::

    kept        layer 0 ● ● ●   layer 1 ● ● ●   layer 2 ● ● ●
    layer 0, 1  layer 0 ●       layer 1 ●       layer 2 ● ● ●      of a recomputed layer only its input is kept

It costs one more forward pass of the chosen layers. It is set on the layers themselves, for any model whose layers are
known. transformers' own switch is not used: some families lack it, and the hook that it puts on the embedding sends
gradients through the whole frozen trunk. Source: Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from byway.core.families import facts
from byway.engine.backward.frontier import frontier_layers
from byway.errors import ConfigError

__all__ = ["checkpointed", "recomputable"]


def recomputable(model: nn.Module) -> tuple[str, ...]:
    """Return the layers of every stack that have a graph, those above the frontier, in the order in which they run.

    Raises:
        TargetError: the layers of this model are not known.
    """
    stacks: Mapping[str, tuple[str, ...]] = facts(model).require("stacks")
    cuts = {cut.stack: cut.above for cut in frontier_layers(model)}
    return tuple(path for stack, layers in stacks.items() for path in cuts.get(stack, layers))


@contextmanager
def checkpointed(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[int]:
    """Recompute `layers` (None: all that have a graph) in the backward pass within this context; yields their number.

    Exact: random numbers (dropout) and context variables (packed documents, disabled adapters) are restored. The model
    is told not to fill a cache of keys and values; a layer that is given one anyway is not recomputed.

    Raises:
        ConfigError: nothing is trained in or below any layer, so no layer keeps activations.
        TargetError: the layers of this model are not known.
    """
    chosen = tuple(recomputable(model) if layers is None else layers)
    if layers is None and not chosen:
        raise ConfigError(
            "no layer keeps activations, because all trainable parameters are above the last layer", "set engine.checkpointing: off"
        )
    with ExitStack() as stack:
        if chosen and "use_cache" in inspect.signature(type(model).forward).parameters:
            stack.callback(model.register_forward_pre_hook(_without_cache, with_kwargs=True).remove)
        for path in chosen:
            stack.enter_context(_recomputed(model.get_submodule(path)))
        yield len(chosen)


def _without_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if torch.is_grad_enabled() and kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    """Wrap the layer's ``forward`` inside its hooks, so that these run once; restores a previous wrapper."""
    own = vars(layer)
    before = own.get("forward")
    own["forward"] = _Recomputed(layer, before)
    try:
        yield
    finally:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before


class _Recomputed:
    """The ``forward`` of a recomputed layer. An object, because a bound method does not survive copying."""

    def __init__(self, layer: nn.Module, previous: Any) -> None:
        self.layer = layer
        self.previous = previous

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer without recomputation."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return self.plain(*args, **kwargs)
        # tensors are passed by position: autograd then saves them itself, visibly for hooks that count or offload saved
        # tensors
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in kwargs.items() if name not in tensors}
        count, names, context, again = len(args), tuple(tensors), contextvars.copy_context(), False

        def run(*values: Any) -> Any:
            # must not refer to `args` or `tensors`, which would keep them alive
            nonlocal again
            named = dict(zip(names, values[count:], strict=True)) | others
            if not again:
                again = True
                return self.plain(*values[:count], **named)
            # the backward pass may run after the contexts of the forward pass have ended
            return context.copy().run(self.plain, *values[:count], **named)

        return checkpoint(run, *args, *tensors.values(), use_reentrant=False)
