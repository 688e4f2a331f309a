"""The frontier (backward cutoff): no saved activations, gradients or dropout below the lowest trained layer.

::

    embeddings ─ layer 0 ─ … ─ layer k-1 ─┤ layer k ─ … ─ layer n-1 ─ norm ─ head
    └──── frozen: eval mode, no graph ────┘ detached here; from here on as in any training

A hook detaches the input of layer k or, if only a head is trained (k = n), the output of the last layer. As long as
nothing below requires a gradient, autograd builds no graph there anyway. But transformers' switch for gradient
checkpointing makes the output of the embedding require one, and its hook stays after the switch is turned off: then the
whole frozen trunk is differentiated, and a fullgraph compile fails. The detach prevents both.

With k ≥ 1 everything below runs in evaluation mode. It is then one function of its input, whose results can be cached.
With k = 0 only the embeddings are frozen, and their dropout acts as in any training.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from byway.core.families import Facts, facts, inside
from byway.core.families.heads import LAST_PARTS
from byway.core.slots import SidePath, base_modules, side_paths

__all__ = ["Cut", "frontier", "frontier_layers", "modules_below"]


@dataclass(frozen=True)
class Cut:
    """Where one stack is cut: ``layers[:index]`` and everything that feeds them are frozen and need no graph."""

    stack: str
    """Name of the stack in :attr:`byway.core.families.Facts.stacks`."""
    layers: tuple[str, ...]
    """All layers of the stack, in the order in which they run."""
    index: int
    """From 0 (only the first layer's input is frozen) to the number of layers (no layer has a graph)."""

    @property
    def first(self) -> str | None:
        """The lowest layer with a graph; None if no layer has one."""
        return self.layers[self.index] if self.index < len(self.layers) else None

    @property
    def below(self) -> tuple[str, ...]:
        """The layers without a graph."""
        return self.layers[: self.index]

    @property
    def above(self) -> tuple[str, ...]:
        """The layers with a graph."""
        return self.layers[self.index :]


def frontier_layers(model: nn.Module) -> tuple[Cut, ...]:
    """Return one cut per stack whose input is frozen; none for a stack with trainable parameters below it.

    Only the parameters of adapters count, not parameters of the base that were unfrozen by hand.
    """
    found = facts(model)
    order = {path: place for place, (path, _) in enumerate(base_modules(model))}
    lowest = {stack: len(layers) for stack, layers in found.stacks.items()}
    for site, _, side in side_paths(model):
        if not side.needs_gradient():
            continue
        layer = found.layer_of(site.path)
        if side.detached and layer is None:
            continue
        for stack in found.stacks:
            index = layer[1] if layer is not None and layer[0] == stack else _lowest(found, order, site.path, side, stack)
            lowest[stack] = min(lowest[stack], index)
    return tuple(Cut(stack, layers, lowest[stack]) for stack, layers in found.stacks.items() if layers and lowest[stack] >= 0)


def _lowest(found: Facts, order: dict[str, int], path: str, side: SidePath, stack: str) -> int:
    """Return the lowest layer of `stack` that needs a graph for a side path at `path`, outside the stack's layers.

    The number of layers if the side path is above all of them, -1 if it feeds the first one.
    """
    layers = found.stacks[stack]
    if _holds(path, layers):
        below = any(side.overrides(verb) for verb in ("before", "attend", "instead"))
        return -1 if below else len(layers)
    if any(inside(path, head) for head in (*found.task_heads, *([found.head] if found.head else []))):
        return len(layers)
    above = order[path] > order[layers[-1]]
    runner = found.stack_modules.get(stack)
    if runner is not None and inside(path, runner):
        return len(layers) if above and _child(path, runner) in LAST_PARTS else -1
    if above:
        return len(layers)
    # an encoder reaches its decoder through the attention of every layer; the input of the decoder's first layer is not
    # made from it
    others = [module for name, module in found.stack_modules.items() if name != stack]
    return 0 if found.kind == "encoder-decoder" and any(inside(path, other) for other in others) else -1


def _holds(path: str, layers: Sequence[str]) -> bool:
    """True if the module at `path` contains `layers`."""
    return path != layers[0] and inside(layers[0], path)


def _child(path: str, runner: str) -> str:
    """Return the name of the child of `runner` that contains `path`."""
    return path[len(runner) + 1 if runner else 0 :].partition(".")[0]


def modules_below(model: nn.Module, cuts: Sequence[Cut]) -> list[nn.Module]:
    """Return the modules below `cuts` of index ≥ 1, which run in evaluation mode during training.

    These are the layers below the cut with all their submodules, the modules that feed the first layer, and the module
    that runs the layers, as its own flag may switch dropout there. A dropout module that a family uses both below and
    above the cut (T5) is included. If a stack is frozen as a whole, so are its last norm and dropout. Heads, and side
    paths of modules outside the layers, are not.
    """
    found = facts(model)
    modules = dict(base_modules(model))
    order = {path: place for place, path in enumerate(modules)}
    heads = (*found.task_heads, *([found.head] if found.head else []))
    runners = [path for path in found.stack_modules.values() if path]
    chosen: dict[int, nn.Module] = {}
    for cut in cuts:
        if not cut.index:
            continue
        for path in cut.below:
            chosen |= {id(module): module for module in modules[path].modules()}
        runner = found.stack_modules.get(cut.stack, "")
        for path, module in modules.items():
            if any(_holds(path, layers) for layers in found.stacks.values()) and path != runner:
                continue
            if path == "" or any(inside(path, part) for part in (*cut.layers, *heads)):
                continue
            if inside(path, runner):
                below = path == runner or not cut.above or order[path] < order[cut.layers[0]] or _child(path, runner) not in LAST_PARTS
            else:
                below = order[path] < order[cut.layers[0]] and not any(inside(path, other) for other in runners)
            if below:
                chosen[id(module)] = module
    return list(chosen.values())


@contextmanager
def frontier(model: nn.Module) -> Iterator[tuple[Cut, ...]]:
    """End the graph at the cuts within this context, and keep the modules below in evaluation mode.

    Yields the cuts. Afterwards each module is in its previous mode, or in the model's mode if that has changed.
    """
    cuts = frontier_layers(model)
    frozen = modules_below(model, cuts)
    modes = [(module, module.training) for module in frozen]
    mode = model.training

    def evaluate(*_: Any) -> None:
        for module in frozen:
            if module.training:
                module.training = False

    evaluate()
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(evaluate).remove)
        for cut in cuts:
            if cut.first is None:
                handle = model.get_submodule(cut.layers[-1]).register_forward_hook(_detach_output)
                stack.callback(handle.remove)
            else:
                layer = model.get_submodule(cut.first)
                entrance = _Entrance(layer)
                stack.callback(model.register_forward_pre_hook(entrance.arm).remove)
                # checkpointing runs the layer again in the backward pass
                stack.callback(model.register_forward_hook(entrance.arm, always_call=True).remove)
                stack.callback(layer.register_forward_pre_hook(entrance.detach, with_kwargs=True, prepend=True).remove)
        try:
            yield cuts
        finally:
            for module, before in modes:
                module.training = before if model.training == mode else model.training


class _Entrance:
    """Detaches a layer's input at its first call in each forward pass; ALBERT runs one layer many times."""

    def __init__(self, layer: nn.Module) -> None:
        self.name = list(inspect.signature(type(layer).forward).parameters)[1]
        self.open = True

    def arm(self, *_: Any) -> None:
        self.open = True

    def detach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Detach the hidden state, the layer's first argument. An encoder's output next to it keeps its graph."""
        if not self.open:
            return args, kwargs
        self.open = False
        if args and isinstance(args[0], Tensor):
            return (args[0].detach(), *args[1:]), kwargs
        hidden = kwargs.get(self.name)
        return (args, kwargs) if hidden is None else (args, {**kwargs, self.name: hidden.detach()})


def _detach_output(module: nn.Module, args: Any, out: Any) -> Any:
    """Detach the hidden state, which a layer returns alone or first of several."""
    return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()
