"""The last layer is computed only where somebody reads it: at a classifier's first token, at the tokens that predict a label.

::

    states (b, t, d) ── K, V: all t ──┐
                   └─── Q: R rows ── attention ── output map ── feed-forward ──► R rows of (b, t, d), zeros elsewhere

Keys and values are needed of every position; queries, the output map and the feed-forward part only of the R that are read. The maps keep
their places: each is given the R rows, (1, R, d), and its answer is laid back into (b, t, d). Nothing reads the other rows, so their
gradients are zero in the plain computation too. For one read token of a row this leaves little more of the last layer than two of its maps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families import Facts, facts
from byway.core.slots import slot_of
from byway.engine.backward.frontier import frontier_layers
from byway.errors import AdapterError

__all__ = ["Read", "last_layer", "layers_run", "maps_by_row", "read_elsewhere", "reading"]

_WORTH = 0.75
"""A larger share of positions than this is not worth taking out and laying back."""


class Read:
    """Which of the positions of one forward anybody reads after the last layer."""

    def __init__(self, marked: Tensor) -> None:
        """`marked`: (b, t) or (1, T), true where a position is read, as the layers see positions."""
        self.marked = marked

    @cached_property
    def index(self) -> Tensor:
        """(R,): their places, row after row, ascending."""
        return self.marked.flatten().nonzero().flatten()

    @cached_property
    def places(self) -> list[int]:
        """The same as numbers."""
        return self.index.tolist()

    def worth(self, share: float) -> bool:
        """Whether leaving the others out saves something: at most `share` of the positions are read."""
        return 0 < len(self.index) <= share * self.marked.numel()

    def counts(self, ends: Sequence[int], causal: bool) -> list[int] | None:
        """How many positions of each document, which ends before the next of `ends`, are read; None where their queries would need a mask
        (causal attention, and not the last token alone)."""
        found, done = [], 0
        for end in ends:
            until = bisect_left(self.places, end)
            if causal and until > done and self.places[done:until] != [end - 1]:
                return None
            found.append(until - done)
            done = until
        return found

    def covers(self, value: Any) -> bool:
        """Whether `value` holds a state for every position: (b, t, d), or (b·t, d) as OPT's feed-forward part has it."""
        if not isinstance(value, Tensor):
            return False
        return value.shape[:-1] in (self.marked.shape, (self.marked.numel(),))

    def rows(self, value: Tensor) -> Tensor:
        """(b, t, d) → (1, R, d); (b·t, d) → (R, d)."""
        index = self.index.to(value.device)
        return value.index_select(0, index) if value.ndim == 2 else value.flatten(0, 1).index_select(0, index)[None]

    def laid_back(self, value: Tensor, *, flat: bool = False) -> Tensor:
        """(1, R, ...) → (b, t, ...), or (R, d) → (b·t, d) if `flat`; zeros where nothing is read."""
        rows = value if flat else value[0]
        table = rows.new_zeros((self.marked.numel(), *rows.shape[1:])).index_copy(0, self.index.to(value.device), rows)
        return table if flat else table.unflatten(0, self.marked.shape)


_READ: ContextVar[Read | None] = ContextVar("byway_positions_read", default=None)


@contextmanager
def reading(marked: Tensor | None) -> Iterator[None]:
    """Around one forward: the positions, as the layers see them, whose states are read after the last layer; None: all."""
    token = _READ.set(None if marked is None else Read(marked))
    try:
        yield
    finally:
        _READ.reset(token)


@contextmanager
def last_layer(model: nn.Module, *, share: float = _WORTH) -> Iterator[None]:
    """Within this context the last layer of `model` leaves out what :func:`reading` says nobody reads, if at most `share` is read.

    Raises:
        AdapterError: the last layer is not known, or something else reads it.
    """
    hooks = _Hooks(share)
    with ExitStack() as stack:
        for path in maps_by_row(model):
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(hooks.take, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(hooks.lay_back).remove)
        found = facts(model)
        (layers,) = found.stacks.values()
        for path in _attentions(found, layers[-1]):
            attention = model.get_submodule(path)
            stack.callback(attention.register_forward_pre_hook(hooks.tell, with_kwargs=True).remove)
        yield


def maps_by_row(model: nn.Module) -> tuple[str, ...]:
    """The modules of the last layer that make of each position what they make of it alone, the widest there are; keys and values aside.

    Raises:
        AdapterError: they are not known, or all positions of the last layer are read.
    """
    found = facts(model)
    if len(found.stacks) != 1:
        raise AdapterError(f"it has {len(found.stacks) or 'no known'} stacks of layers")
    ((name, layers),) = found.stacks.items()
    last = layers[-1]
    config: Any = vars(model).get("config")
    if config is not None and (times := config.to_dict().get("num_hidden_layers", len(layers))) != len(layers):
        raise AdapterError(f"its last layer runs several times ({times} times {len(layers)} layers)")
    for path in (last, found.stack_modules[name]):
        slot = slot_of(model.get_submodule(path))
        if slot is not None and slot.afters:
            raise AdapterError(f"a side path reads all that {path} gives")
    attentions = _attentions(found, last)
    if not attentions:
        raise AdapterError("where queries meet keys in the last layer is not known")
    for_all = {*found.projections("k"), *found.projections("v")}
    queries = [path for path in found.projections("q") if path not in for_all]
    chosen: dict[str, None] = {}
    for path in (*queries, *found.attention_outputs, *found.feed_forward_linears):
        if _within(path, last):
            chosen[_widest(path, last, attentions)] = None
    # a map may lie in a wider one that another map has led to
    return tuple(path for path in chosen if not any(other != path and _within(path, other) for other in chosen))


def layers_run(model: nn.Module, *, cached: bool) -> int:
    """How many layers a step runs: all, or those above the frontier where the states there are cached."""
    ((name, layers),) = facts(model).stacks.items()
    cut = {cut.stack: cut.index for cut in frontier_layers(model)}.get(name, 0)
    return max(len(layers) - (cut if cached else 0), 1)


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _attentions(found: Facts, layer: str) -> tuple[str, ...]:
    return tuple(path for path in found.attention_modules if _within(path, layer))


def _widest(path: str, layer: str, attentions: tuple[str, ...]) -> str:
    """The outermost module around `path`, inside the layer, in which no positions meet."""
    while True:
        parent = path.rpartition(".")[0]
        if parent == layer or any(_within(attention, parent) for attention in attentions):
            return path
        path = parent


def read_elsewhere(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """(how many positions `loss` reads after the last layer beside those that it says by :func:`reading`, positions in all).

    By its gradient, which is exactly zero where a state has no say, in every dtype.

    Raises:
        AdapterError: the last layer does not run once, or hands on more than states.
    """
    seen: list[tuple[Tensor, Read | None]] = []

    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        states = (out if isinstance(out, Tensor) else out[0]).detach().requires_grad_()
        seen.append((states, _READ.get()))
        return states if isinstance(out, Tensor) else (states, *out[1:])

    (layers,) = facts(model).stacks.values()
    handle = model.get_submodule(layers[-1]).register_forward_hook(cut)
    try:
        with torch.enable_grad():
            total = loss()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise AdapterError(f"its last layer runs {len(seen)} times in one forward")
    ((states, read),) = seen
    assert read is not None
    (gradient,) = torch.autograd.grad(total, states, allow_unused=True, materialize_grads=True)
    missed = gradient.ne(0).any(-1) & ~read.marked.to(gradient.device)
    return int(missed.sum()), missed.numel()


# ---------------------------------------------------------------- hooks


class _Hooks:
    """What stands before and after the last layer's modules."""

    def __init__(self, share: float) -> None:
        self.share = share

    def _here(self) -> Read | None:
        read = None if torch.compiler.is_compiling() else _READ.get()
        return read if read is not None and read.worth(self.share) else None

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rows that are read, in place of every position's."""
        read = self._here()
        if read is None:
            return None
        values = (*args, *kwargs.values())
        if not any(map(read.covers, values)):
            raise AdapterError(f"a {type(module).__name__} of the last layer is not called with the states of every position")
        taken = [read.rows(value) if read.covers(value) else value for value in values]
        return tuple(taken[: len(args)]), dict(zip(kwargs, taken[len(args) :], strict=True))

    def lay_back(self, module: nn.Module, args: Any, out: Any) -> Any:
        """What was made of those rows, in a table of every position."""
        read = self._here()
        if read is None:
            return None
        if not (isinstance(out, Tensor) and out.shape[:-1] in ((1, len(read.index)), (len(read.index),))):
            raise AdapterError(f"a {type(module).__name__} of the last layer does not answer position by position")
        return read.laid_back(out, flat=out.ndim == 2)

    def tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Our attention function learns which queries are read, where documents are packed."""
        read = self._here()
        return None if read is None or kwargs.get("cu_seq_lens_q") is None else (args, {**kwargs, "queries_read": read})
