"""The frontier: below the lowest layer with something to train, nothing is kept, no gradient flows, and no dropout acts.

::

    embeddings ─ layer 0 ─ … ─ layer k-1 ─┤ layer k ─ … ─ layer n-1 ─ norm ─ head
    └──── frozen: eval mode, no graph ────┘ detached here; from here on as in any training

A hook detaches what enters layer k, or, with only a head to train (k = n), what leaves the last layer. Without it nothing would flow
there either, as long as nothing below requires a gradient; but transformers' switch for activation checkpointing makes the embedding's
output require one, its hook stays behind after the switch is turned off, and then the whole frozen trunk is differentiated (and a fullgraph
compile fails). With k ≥ 1 everything below runs in evaluation mode, so that it is one function of its input, which may be computed once
and kept. With k = 0 only the embeddings are frozen: their dropout acts, as in any training.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from byway.core.families import Facts, facts
from byway.core.families.heads import LAST_PARTS
from byway.core.slots import SidePath, base_modules, side_paths

__all__ = ["Cut", "frontier", "frontier_layers", "resting"]


@dataclass(frozen=True)
class Cut:
    """Where one stack is cut: ``layers[:index]``, and whatever feeds them, is frozen and needs no graph."""

    stack: str
    """Its name in :attr:`byway.core.families.Facts.stacks`."""
    layers: tuple[str, ...]
    """All of its layers, in the order in which they run."""
    index: int
    """0 (only what feeds the first layer is frozen) … n, the number of layers (only what reads the last one is trained)."""

    @property
    def first(self) -> str | None:
        """The lowest layer with a graph; None if there is none."""
        return self.layers[self.index] if self.index < len(self.layers) else None

    @property
    def below(self) -> tuple[str, ...]:
        """The layers without a graph."""
        return self.layers[: self.index]

    @property
    def above(self) -> tuple[str, ...]:
        """The layers with one."""
        return self.layers[self.index :]


def frontier_layers(model: nn.Module) -> tuple[Cut, ...]:
    """One cut for each stack that is fed by frozen parts only; a stack with something trained below its first layer is left out.

    What is trained is what adapters train; parameters of the base that were unfrozen by hand do not count.
    """
    found = facts(model)
    order = {path: place for place, (path, _) in enumerate(base_modules(model))}
    lowest = {stack: len(layers) for stack, layers in found.stacks.items()}
    for site, _, side in side_paths(model):
        if not side.learns():
            continue
        inside = found.layer_of(site.path)
        if side.detached and inside is None:
            continue
        for stack in found.stacks:
            place = inside[1] if inside is not None and inside[0] == stack else _place(found, order, site.path, side, stack)
            lowest[stack] = min(lowest[stack], place)
    return tuple(Cut(stack, layers, lowest[stack]) for stack, layers in found.stacks.items() if layers and lowest[stack] >= 0)


def _holds(path: str, layers: Sequence[str]) -> bool:
    """Whether the module at `path` contains these layers."""
    return path == "" or layers[0].startswith(f"{path}.")


def _inside(path: str, module: str) -> bool:
    return module in ("", path) or path.startswith(f"{module}.")


def _place(found: Facts, order: dict[str, int], path: str, side: SidePath, stack: str) -> int:
    """The lowest layer of `stack` that needs a graph for a side path outside of its layers: n if above them, -1 if it feeds the first."""
    layers = found.stacks[stack]
    if _holds(path, layers):
        below = any(side.overrides(verb) for verb in ("before", "attend", "instead"))
        return -1 if below else len(layers)
    if any(_inside(path, head) for head in (*found.task_heads, *([found.head] if found.head else []))):
        return len(layers)
    above = order[path] > order[layers[-1]]
    runner = found.stack_modules.get(stack)
    if runner is not None and _inside(path, runner):
        return len(layers) if above and _part(path, runner) in LAST_PARTS else -1
    if above:
        return len(layers)
    # an encoder reaches its decoder through the attention of every layer; what enters the decoder's first layer is not made from it
    others = [module for name, module in found.stack_modules.items() if name != stack]
    return 0 if found.kind == "encoder-decoder" and any(_inside(path, other) for other in others) else -1


def _part(path: str, runner: str) -> str:
    """The child of `runner` that `path` lies in."""
    return path[len(runner) + 1 if runner else 0 :].partition(".")[0]


def resting(model: nn.Module, cuts: Sequence[Cut]) -> list[nn.Module]:
    """The modules below the cuts (index ≥ 1 only) that run in evaluation mode while training.

    Layers with all that hangs on them, what feeds the first layer, and the module that runs the layers where its own flag switches dropout
    there; a dropout module that a family uses below and above (T5's) counts as below. Of a stack that is frozen from end to end, its last
    norm and dropout too. Heads and what hangs on modules outside of the layers are left alone.
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
            if path == "" or any(_inside(path, part) for part in (*cut.layers, *heads)):
                continue
            if _inside(path, runner):
                below = path == runner or not cut.above or order[path] < order[cut.layers[0]] or _part(path, runner) not in LAST_PARTS
            else:
                below = order[path] < order[cut.layers[0]] and not any(_inside(path, other) for other in runners)
            if below:
                chosen[id(module)] = module
    return list(chosen.values())


@contextmanager
def frontier(model: nn.Module) -> Iterator[tuple[Cut, ...]]:
    """Within this context the graph ends at the cuts, and what is below them is in evaluation mode whatever ``model.train()`` says.

    Yields the cuts. At the end each module is back in the mode it was in, or in the model's where that has changed since.
    """
    cuts = frontier_layers(model)
    still = resting(model, cuts)
    modes = [(module, module.training) for module in still]
    mode = model.training

    def rest(*_: Any) -> None:
        for module in still:
            if module.training:
                module.training = False

    rest()
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(rest).remove)
        for cut in cuts:
            if cut.first is None:
                handle = model.get_submodule(cut.layers[-1]).register_forward_hook(_detach_output)
                stack.callback(handle.remove)
            else:
                _Entrance(model, model.get_submodule(cut.first)).hang(stack)
        try:
            yield cuts
        finally:
            for module, before in modes:
                module.training = before if model.training == mode else model.training


class _Entrance:
    """Detaches what enters a layer: at its first call in a forward of the model (ALBERT runs one layer many times)."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer = model, layer
        self.name = list(inspect.signature(type(layer).forward).parameters)[1]
        self.open = True

    def hang(self, stack: ExitStack) -> None:
        stack.callback(self.model.register_forward_pre_hook(self._arm).remove)
        stack.callback(self.model.register_forward_hook(self._arm, always_call=True).remove)  # a layer is run again in a backward pass
        stack.callback(self.layer.register_forward_pre_hook(self._detach, with_kwargs=True, prepend=True).remove)

    def _arm(self, *_: Any) -> None:
        self.open = True

    def _detach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hidden state is a layer's first argument, by position or by its name; an encoder's output beside it keeps its graph."""
        if not self.open:
            return args, kwargs
        self.open = False
        if args and isinstance(args[0], Tensor):
            return (args[0].detach(), *args[1:]), kwargs
        hidden = kwargs.get(self.name)
        return (args, kwargs) if hidden is None else (args, {**kwargs, self.name: hidden.detach()})


def _detach_output(module: nn.Module, args: Any, out: Any) -> Any:
    """The hidden state is what a layer gives, or the first of what it gives."""
    return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()
