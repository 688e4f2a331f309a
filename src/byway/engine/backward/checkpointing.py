"""Activation checkpointing, layer by layer: a layer's activations are computed again in the backward pass instead of being kept.

::

    kept        layer 0 ● ● ●   layer 1 ● ● ●   layer 2 ● ● ●
    layer 0, 1  layer 0 ●       layer 1 ●       layer 2 ● ● ●      only what enters a recomputed layer is kept

Set on the layers themselves, of any model whose layers are known, and not by transformers' switch, which some families lack and whose
embedding hook sends gradients through the whole frozen trunk. Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """The layers of every stack that have a graph: those above the frontier, in the order in which they run.

    Raises:
        TargetError: the layers of this model are not known.
    """
    stacks: Mapping[str, tuple[str, ...]] = facts(model).require("stacks")
    cuts = {cut.stack: cut.above for cut in frontier_layers(model)}
    return tuple(path for stack, layers in stacks.items() for path in cuts.get(stack, layers))


@contextmanager
def checkpointed(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[int]:
    """Within this context these layers (None: all that have a graph) are recomputed in the backward pass; yields how many they are.

    Exact: the random stream (dropout) and what contexts say (packed documents, muted adapters) are as they were. A model that would
    fill a cache of keys and values is told not to; a layer that is given one nevertheless is not recomputed.

    Raises:
        ConfigError: nothing is trained in or below any layer, so there is nothing to recompute.
        TargetError: the layers of this model are not known.
    """
    chosen = tuple(recomputable(model) if layers is None else layers)
    if layers is None and not chosen:
        raise ConfigError("no layer keeps activations: what is trained reads the last one's output", "set engine.checkpointing: off")
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
    """An instance ``forward`` inside of the layer's hooks, so that these act once; what stood there before is called by it and put back."""
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
    """The forward of a layer that is recomputed; an object, since a bound method would not survive copying."""

    def __init__(self, layer: nn.Module, previous: Any) -> None:
        self.layer = layer
        self.previous = previous

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What would be called without us."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return self.plain(*args, **kwargs)
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in kwargs.items() if name not in tensors}
        # tensors go by position: those are saved as autograd saves, so that whoever counts or moves saved tensors sees them
        run = _Run(self.plain, len(args), tuple(tensors), others)
        return checkpoint(run, *args, *tensors.values(), use_reentrant=False)


class _Run:
    """One call of a layer, now and again in the backward pass, there in a copy of the context variables of now."""

    def __init__(self, plain: Any, count: int, names: Sequence[str], others: dict[str, Any]) -> None:
        self.plain, self.count, self.names, self.others = plain, count, names, others
        self.context = contextvars.copy_context()
        self.again = False

    def __call__(self, *values: Any) -> Any:
        kwargs = dict(zip(self.names, values[self.count :], strict=True)) | self.others
        if not self.again:
            self.again = True
            return self.plain(*values[: self.count], **kwargs)
        return self.context.copy().run(self.plain, *values[: self.count], **kwargs)
