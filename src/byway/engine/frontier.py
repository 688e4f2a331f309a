"""The frontier: below the lowest layer with something to train, nothing is kept and no gradient flows.

A hook detaches what enters that layer. Without it nothing would flow there either, as long as nothing below requires a gradient; but
transformers' switch for activation checkpointing makes the embedding's output require one, its hook stays behind after the switch is turned
off, and then the whole frozen trunk is differentiated (and a fullgraph compile fails).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from byway.core import base_modules, side_paths
from byway.families import facts

__all__ = ["frontier", "frontier_layers"]


def frontier_layers(model: nn.Module) -> tuple[str, ...]:
    """The lowest trained layer of each stack that has one; empty if something below the layers is trained (an embedding, a prompt)."""
    found = facts(model)
    order = {path: place for place, (path, _) in enumerate(base_modules(model))}
    trained = [site.path for site, _, side in side_paths(model) if any(p.requires_grad for p in side.parameters())]
    lowest: dict[str, int] = {}
    for path in trained:
        place = found.layer_of(path)
        if place is not None:
            stack, index = place
            lowest[stack] = min(index, lowest.get(stack, index))
        elif any(order[path] < order[layers[0]] for layers in found.stacks.values() if layers):
            return ()
    return tuple(found.stacks[stack][index] for stack, index in lowest.items())


@contextmanager
def frontier(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Within this context the inputs of the frontier layers are detached; yields their paths."""
    paths = frontier_layers(model)
    handles: list[RemovableHandle] = []
    try:
        for path in paths:
            handles.append(model.get_submodule(path).register_forward_pre_hook(_detach, with_kwargs=True, prepend=True))
        yield paths
    finally:
        for handle in handles:
            handle.remove()


def _detach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden state is a layer's first argument, by position or by its name; an encoder's output beside it keeps its graph."""
    if args and isinstance(args[0], Tensor):
        return (args[0].detach(), *args[1:]), kwargs
    hidden = kwargs.get("hidden_states")
    return (args, kwargs) if hidden is None else (args, {**kwargs, "hidden_states": hidden.detach()})
