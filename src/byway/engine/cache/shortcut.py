"""The shortcut through a frozen trunk: which modules are not run, and at which ones the cached states come in.

::

    embeddings ─ layer 0 ─ … ─ layer k-2 ─ layer k-1 ─┤ layer k ─ … ─ norm ─ head
      as usual     hand on what they get     gives      as usual, from the cached states on

Everything else is the user's own model: it computes masks, positions and rotary angles, and calls its layers as ever. A layer that is not
run has an instance ``forward`` for as long as the context lasts; what hangs on the layer itself (a tap of a ladder, a side path of a frozen
adapter) fires as always, on the very output that the layer would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from byway.core.families import facts
from byway.core.slots import slot_of
from byway.engine.backward.frontier import Cut, frontier_layers
from byway.errors import AdapterError

__all__ = ["Given", "Reached", "Shortcut", "capturing", "replaying", "shortcuts"]

Form = Literal["tensor", "tuple", "output"]
"""How a module hands its states on: bare, as the first of a tuple of which the rest is None, or as an output's ``last_hidden_state``."""


@dataclass(frozen=True)
class Shortcut:
    """One way past a frozen trunk."""

    gives: tuple[str, ...]
    """The modules whose outputs are kept, in the order in which they run."""
    skips: tuple[str, ...]
    """The layers that hand on what they get, since nobody reads what they would compute."""
    runner: str
    """The module that runs them all; once it is done, everything has been seen."""
    where: str
    """In words, for the plan."""
    head_only: bool = False
    """Whether nothing but a head reads the states, so that only the rows that it reads are needed."""


@dataclass(frozen=True)
class Given:
    """A module that gives cached states: how it hands them on, and how often it is called in one forward (ALBERT calls a layer n times)."""

    path: str
    form: Form
    make: Callable[[Tensor], Any]
    """states → the module's output."""
    width: int
    dtype: Any
    calls: int


class Reached(Exception):
    """Ends a forward once every state that is wanted has been seen."""


def shortcuts(model: nn.Module) -> tuple[Shortcut, ...]:
    """The ways past the frozen trunk of `model`, the one with the least to store first; each later one hands on more.

    Raises:
        AdapterError: there is none; the message says what is in the way.
    """
    found = facts(model)
    cuts = {cut.stack: cut for cut in frontier_layers(model)}
    if not found.stacks:
        raise AdapterError(f"the layers of {type(model).__name__} are not known")
    if found.kind == "encoder-decoder" and "encoder" in found.stacks and len(found.stacks) > 1:
        return _encoder(found.stack_modules["encoder"], model, cuts.get("encoder"))
    if len(found.stacks) > 1:
        raise AdapterError(f"{type(model).__name__} has several towers")
    ((name, layers),) = found.stacks.items()
    cut = cuts.get(name)
    if cut is None:
        raise AdapterError("something that feeds the first layer is trained")
    if cut.index == 0:
        raise AdapterError(f"the first of {len(layers)} layers is trained" if layers else "there are no layers")
    runner = found.stack_modules[name]
    if cut.index < len(layers):
        where = f"layer {cut.index} of {len(layers)}"
        return (Shortcut((layers[cut.index - 1],), layers[: cut.index - 1], runner, where),)
    tapped = [path for path in layers if _read_at(model.get_submodule(path))]
    if not tapped:
        return (Shortcut(layers[-1:], layers[:-1], runner, f"above layer {len(layers)}", head_only=True),)
    chosen = [tapped] if tapped[-1] == layers[-1] else [tapped, [*tapped, layers[-1]]]
    return tuple(_taps(layers, given, runner) for given in chosen)


def _taps(layers: Sequence[str], given: Sequence[str], runner: str) -> Shortcut:
    where = f"{len(given)} of {len(layers)} layers" if len(given) < len(layers) else f"all {len(layers)} layers"
    return Shortcut(tuple(given), tuple(path for path in layers if path not in given), runner, where)


def _encoder(path: str, model: nn.Module, cut: Cut | None) -> tuple[Shortcut, ...]:
    """The encoder's output, final norm and all; inside the stacks layers hand each other more than hidden states (T5's position bias)."""
    if cut is None or cut.index < len(cut.layers):
        raise AdapterError("something in the encoder, or below it, is trained")
    slot = slot_of(model.get_submodule(path))
    if slot is not None and any(side.learns() for _, side in slot.sides()):
        raise AdapterError("a ladder beside the encoder is trained")
    return (Shortcut((path,), (), path, "the encoder's output"),)


def _read_at(layer: nn.Module) -> bool:
    """Whether something without tensors of its own reads this layer's output: the tap of a ladder."""
    slot = slot_of(layer)
    return slot is not None and any(side.overrides("after") and not side.state_dict() for name, side in slot.sides() if name in slot.active)


# ---------------------------------------------------------------- capturing


@contextmanager
def capturing(model: nn.Module, wanted: Mapping[str, int], seen: Callable[[str, Any], None], done: Callable[[], None]) -> Iterator[None]:
    """Within this context `seen` is told what each module of `wanted` (path → which of its calls) gives, before any hook changes it.

    After the last of them `done` is called, which may end the forward with :class:`Reached`.
    """
    left = set(wanted)

    def on(path: str) -> Callable[..., Any]:
        module = model.get_submodule(path)
        own, count = _own_forward(module), 0

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
            stack.enter_context(_answering(model.get_submodule(path), on(path)))
        yield


# ---------------------------------------------------------------- replaying


@contextmanager
def replaying(
    model: nn.Module, shortcut: Shortcut, given: Mapping[str, Given], states: Callable[[str, tuple[int, int]], Tensor]
) -> Iterator[None]:
    """Within this context the modules of `shortcut` are not run; those that give hand on ``states(path, (rows, columns))``."""

    def give(path: str) -> Callable[..., Any]:
        one = given[path]

        def call(*args: Any, **kwargs: Any) -> Any:
            return one.make(states(path, _shape(args, kwargs)))

        return call

    def skip(path: str) -> Callable[..., Any]:
        one = given[path]

        def call(*args: Any, **kwargs: Any) -> Any:
            return one.make(args[0] if args else kwargs["hidden_states"])

        return call

    with ExitStack() as stack:
        for path in shortcut.skips:
            stack.enter_context(_answering(model.get_submodule(path), skip(path)))
        for path in shortcut.gives:
            stack.enter_context(_answering(model.get_submodule(path), give(path)))
        yield


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of what goes into a layer, or into a whole stack."""
    named = ("hidden_states", "input_ids", "inputs_embeds")
    first = args[0] if args and isinstance(args[0], Tensor) else next((v for n in named if isinstance(v := kwargs.get(n), Tensor)), None)
    if first is None:
        raise AdapterError("a skipped part of the model was called without a hidden state, so cached states have no place there")
    return int(first.shape[0]), int(first.shape[1])


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """What the module computes now, a side path that answers in its place included."""
    previous = module.__dict__.get("forward")
    return previous if previous is not None else type(module).forward.__get__(module)


@contextmanager
def _answering(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Within this context `call` answers in the module's place; afterwards its own forward, and its compiled call, are as they were."""
    own = vars(module)
    before = {name: own[name] for name in _ENTRIES if name in own}
    own["forward"] = call
    if own.get("_compiled_call_impl") is not None:
        own["_compiled_call_impl"] = None
    try:
        yield
    finally:
        for name in _ENTRIES:
            own.pop(name, None)
        own.update(before)


_ENTRIES = ("forward", "_compiled_call_impl")
