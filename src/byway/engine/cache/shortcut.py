"""The shortcut past a frozen trunk: which modules are not run, and at which ones the cached states enter.

::

    embeddings ─ layer 0 ─ … ─ layer k-2 ─ layer k-1 ─┤ layer k ─ … ─ norm ─ head
     as usual    return their input        returns     as usual, from the cached states on
                                           the cached states

Everything else is the user's own model: it computes masks, positions and rotary angles and calls its layers as always.
A layer that is not run has an instance ``forward`` within the context. The hooks of such a layer (a ladder's tap, a
side path of a frozen adapter) still run, on the output that the layer would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from byway.core.families import facts
from byway.core.slots import slot_of
from byway.engine.backward.frontier import frontier_layers
from byway.errors import AdapterError

__all__ = ["Given", "Reached", "Shortcut", "capturing", "replaying", "shortcuts"]


@dataclass(frozen=True)
class Shortcut:
    """One way past a frozen trunk."""

    gives: tuple[str, ...]
    """The modules whose outputs are cached, in the order in which they run."""
    skips: tuple[str, ...]
    """The layers that return their input, because nothing reads their output."""
    runner: str
    """The module that runs them all. Once it has returned, all states have been seen."""
    where: str
    """A description for the plan."""
    head_only: bool = False
    """True if only a head reads the states, so that only the rows it reads are needed."""


@dataclass(frozen=True)
class Given:
    """The output of a module of a shortcut."""

    path: str
    make: Callable[[Tensor], Any]
    """States → the module's output: the states alone, first of a tuple of None, or as ``last_hidden_state``."""
    width: int
    dtype: Any
    calls: int
    """Calls of the module in one forward pass; ALBERT calls one layer many times."""


class Reached(Exception):
    """Ends a forward pass once all states of interest have been seen."""


def shortcuts(model: nn.Module) -> tuple[Shortcut, ...]:
    """Return the shortcuts past the frozen trunk of `model`, the one with the fewest states to store first.

    Raises:
        AdapterError: there is none; the message says why.
    """
    found = facts(model)
    cuts = {cut.stack: cut for cut in frontier_layers(model)}
    if not found.stacks:
        raise AdapterError(f"the layers of {type(model).__name__} are not known")
    if found.kind == "encoder-decoder" and "encoder" in found.stacks and len(found.stacks) > 1:
        # the encoder's output after its final norm: inside the stacks layers pass on more than hidden states (T5's
        # position bias)
        path, cut = found.stack_modules["encoder"], cuts.get("encoder")
        if cut is None or cut.index < len(cut.layers):
            raise AdapterError("something in the encoder, or below it, is trained")
        slot = slot_of(model.get_submodule(path))
        if slot is not None and any(side.needs_gradient() for _, side in slot.sides()):
            raise AdapterError("a ladder beside the encoder is trained")
        return (Shortcut((path,), (), path, "the encoder's output"),)
    if len(found.stacks) > 1:
        raise AdapterError(f"{type(model).__name__} has several towers")
    ((name, layers),) = found.stacks.items()
    cut, runner = cuts.get(name), found.stack_modules[name]
    if cut is None:
        raise AdapterError("something that feeds the first layer is trained")
    if cut.index == 0:
        raise AdapterError(f"the first of {len(layers)} layers is trained" if layers else "there are no layers")
    if cut.index < len(layers):
        where = f"layer {cut.index} of {len(layers)}"
        return (Shortcut((layers[cut.index - 1],), layers[: cut.index - 1], runner, where),)
    tapped = [path for path in layers if _tapped(model.get_submodule(path))]
    if not tapped:
        return (Shortcut(layers[-1:], layers[:-1], runner, f"above layer {len(layers)}", head_only=True),)
    ways = []
    for given in [tapped] if tapped[-1] == layers[-1] else [tapped, [*tapped, layers[-1]]]:
        where = f"{len(given)} of {len(layers)} layers" if len(given) < len(layers) else f"all {len(layers)} layers"
        ways.append(Shortcut(tuple(given), tuple(path for path in layers if path not in given), runner, where))
    return tuple(ways)


def _tapped(layer: nn.Module) -> bool:
    """True if an active side path without tensors of its own reads this layer's output: the tap of a ladder."""
    slot = slot_of(layer)
    return slot is not None and any(side.overrides("after") and not side.state_dict() for name, side in slot.sides() if name in slot.active)


@contextmanager
def capturing(model: nn.Module, wanted: Mapping[str, int], seen: Callable[[str, Any], None], done: Callable[[], None]) -> Iterator[None]:
    """Call ``seen(path, output)`` for the modules `wanted` within this context, before hooks change the output.

    Args:
        wanted: path → number of the call whose output is wanted; 0: every call.
        seen: called with path and output.
        done: called after the last output; may end the forward pass with :class:`Reached`.
    """
    left = set(wanted)

    def on(path: str) -> Callable[..., Any]:
        module = model.get_submodule(path)
        # with a side path that computes in the module's place, if there is one
        previous, count = module.__dict__.get("forward"), 0
        own = previous if previous is not None else type(module).forward.__get__(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            out = own(*args, **kwargs)
            count += 1
            if wanted[path] in (0, count):
                seen(path, out)
            if wanted[path] == count:
                left.discard(path)
                if not left:
                    done()
            return out

        return call

    with ExitStack() as stack:
        for path in wanted:
            stack.enter_context(_replaced(model.get_submodule(path), on(path)))
        yield


@contextmanager
def replaying(
    model: nn.Module, shortcut: Shortcut, given: Mapping[str, Given], states: Callable[[str, tuple[int, int]], Tensor]
) -> Iterator[None]:
    """Skip the modules of `shortcut` within this context; those that give return ``states(path, (rows, columns))``."""

    def returning(path: str, found: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]) -> Callable[..., Any]:
        make = given[path].make
        return lambda *args, **kwargs: make(found(args, kwargs))

    with ExitStack() as stack:
        for path in shortcut.skips:
            same = returning(path, lambda args, kwargs: args[0] if args else kwargs["hidden_states"])
            stack.enter_context(_replaced(model.get_submodule(path), same))
        for path in shortcut.gives:
            cached = returning(path, lambda args, kwargs, path=path: states(path, _shape(args, kwargs)))
            stack.enter_context(_replaced(model.get_submodule(path), cached))
        yield


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Return (rows, columns) of the input of a layer or a whole stack."""
    named = ("hidden_states", "input_ids", "inputs_embeds")
    first = args[0] if args and isinstance(args[0], Tensor) else next((v for n in named if isinstance(v := kwargs.get(n), Tensor)), None)
    if first is None:
        raise AdapterError("a skipped part of the model was called without a hidden state, so its shape is not known")
    return int(first.shape[0]), int(first.shape[1])


@contextmanager
def _replaced(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's ``forward`` by `call` within this context; a compiled call is set aside too."""
    own, entries = vars(module), ("forward", "_compiled_call_impl")
    before = {name: own[name] for name in entries if name in own}
    own["forward"] = call
    if own.get("_compiled_call_impl") is not None:
        own["_compiled_call_impl"] = None
    try:
        yield
    finally:
        for name in entries:
            own.pop(name, None)
        own.update(before)
