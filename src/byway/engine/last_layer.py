"""The last layer, computed only where its output is read: a first token, the tokens that predict a label.

::

    states (b, t, d) ── K, V: all t ──┐
                   └─── Q: R rows ── attention ── output map ── feed-forward ──► R rows of (b, t, d), zeros elsewhere

Keys and values are needed at every position; queries, the attention's output map and the feed-forward part only at the
R positions that are read. The modules stay in place: a hook passes each one the R rows, (1, R, d), and another writes
its output back into (b, t, d). The other rows are read by nobody, so their gradients are zero in the plain computation
too. If one token per row is read, little more of the last layer is left than the projections of keys and values.
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

from byway.core.families import Facts, facts, inside
from byway.core.slots import slot_of
from byway.engine.backward.frontier import frontier_layers
from byway.errors import AdapterError

__all__ = ["PositionsRead", "last_layer", "layers_run", "maps_by_row", "positions_read", "read_elsewhere"]

_WORTH = 0.75
"""If a larger share of the positions is read, gathering and scattering them costs more than it saves."""


class PositionsRead:
    """The positions of one forward pass whose states are read after the last layer."""

    def __init__(self, marked: Tensor) -> None:
        """`marked`: (b, t), or (1, T) for a packed row; True where a position is read."""
        self.marked = marked

    @cached_property
    def index(self) -> Tensor:
        """(R,): the positions in the flattened batch, ascending."""
        return self.marked.flatten().nonzero().flatten()

    @cached_property
    def places(self) -> list[int]:
        """:attr:`index` as a list."""
        return self.index.tolist()

    def worth(self, share: float) -> bool:
        """True if leaving the others out saves work: at most `share` of the positions are read, at least one."""
        return 0 < len(self.index) <= share * self.marked.numel()

    def counts(self, ends: Sequence[int], causal: bool) -> list[int] | None:
        """Return how many positions of each document are read; `ends`: the position after the last of each document.

        None if their queries would need a mask: causal attention, and not just the last token of a document read.
        """
        found, done = [], 0
        for end in ends:
            until = bisect_left(self.places, end)
            if causal and until > done and self.places[done:until] != [end - 1]:
                return None
            found.append(until - done)
            done = until
        return found

    def covers(self, value: Any) -> bool:
        """True if `value` holds a state for every position: (b, t, d), or (b·t, d) as in OPT's feed-forward part."""
        if not isinstance(value, Tensor):
            return False
        return value.shape[:-1] in (self.marked.shape, (self.marked.numel(),))

    def gather(self, value: Tensor) -> Tensor:
        """Select the rows that are read: (b, t, d) → (1, R, d), (b·t, d) → (R, d)."""
        index = self.index.to(value.device)
        return value.index_select(0, index) if value.ndim == 2 else value.flatten(0, 1).index_select(0, index)[None]

    def scatter(self, value: Tensor, *, flat: bool = False) -> Tensor:
        """Undo :meth:`gather`, zeros elsewhere: (1, R, ...) → (b, t, ...), or if `flat` (R, d) → (b·t, d)."""
        rows = value if flat else value[0]
        table = rows.new_zeros((self.marked.numel(), *rows.shape[1:])).index_copy(0, self.index.to(value.device), rows)
        return table if flat else table.unflatten(0, self.marked.shape)


_READ: ContextVar[PositionsRead | None] = ContextVar("byway_positions_read", default=None)


@contextmanager
def positions_read(marked: Tensor | None) -> Iterator[None]:
    """Say at which positions (b, t) the states of one forward pass are read after the last layer; None: all."""
    token = _READ.set(None if marked is None else PositionsRead(marked))
    try:
        yield
    finally:
        _READ.reset(token)


@contextmanager
def last_layer(model: nn.Module, *, share: float = _WORTH) -> Iterator[None]:
    """Compute the last layer at the :func:`positions_read` only, if at most `share` of the positions are.

    Raises:
        AdapterError: the last layer is not known, or something reads it at every position.
    """
    hooks = _Hooks(share)
    with ExitStack() as stack:
        for path in maps_by_row(model):
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(hooks.gather, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(hooks.scatter).remove)
        found = facts(model)
        (layers,) = found.stacks.values()
        for path in _attentions(found, layers[-1]):
            attention = model.get_submodule(path)
            stack.callback(attention.register_forward_pre_hook(hooks.tell_attention, with_kwargs=True).remove)
        yield


def maps_by_row(model: nn.Module) -> tuple[str, ...]:
    """Return the outermost modules of the last layer that act row by row, except those of keys and values.

    Raises:
        AdapterError: they are not known, or something reads the last layer at every position.
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
            raise AdapterError(f"a side path reads the whole output of {path}")
    attentions = _attentions(found, last)
    if not attentions:
        raise AdapterError("the attention of its last layer is not known")
    for_all = {*found.projections("k"), *found.projections("v")}
    queries = [path for path in found.projections("q") if path not in for_all]
    chosen: dict[str, None] = {}
    for path in (*queries, *found.attention_outputs, *found.feed_forward_linears):
        if not inside(path, last):
            continue
        # up to the outermost module below the layer in which positions do not meet
        while (parent := path.rpartition(".")[0]) != last and not any(inside(attention, parent) for attention in attentions):
            path = parent
        chosen[path] = None
    # a module may lie in a wider one that another map has led to
    return tuple(path for path in chosen if not any(other != path and inside(path, other) for other in chosen))


def layers_run(model: nn.Module, *, cached: bool) -> int:
    """Return how many layers a step runs: all, or with a cache (`cached`) those above the frontier."""
    ((name, layers),) = facts(model).stacks.items()
    cut = {cut.stack: cut.index for cut in frontier_layers(model)}.get(name, 0)
    return max(len(layers) - (cut if cached else 0), 1)


def _attentions(found: Facts, layer: str) -> tuple[str, ...]:
    return tuple(path for path in found.attention_modules if inside(path, layer))


def read_elsewhere(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Return (positions that `loss` reads besides the :func:`positions_read`, positions in all).

    A position is read if the gradient of its state is not zero. This test is exact in every dtype.

    Raises:
        AdapterError: the last layer does not run exactly once, or returns more than states.
    """
    seen: list[tuple[Tensor, PositionsRead | None]] = []

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
        raise AdapterError(f"its last layer runs {len(seen)} times in one forward pass")
    ((states, read),) = seen
    assert read is not None
    (gradient,) = torch.autograd.grad(total, states, allow_unused=True, materialize_grads=True)
    missed = gradient.ne(0).any(-1) & ~read.marked.to(gradient.device)
    return int(missed.sum()), missed.numel()


class _Hooks:
    """The hooks before and after the modules of the last layer."""

    def __init__(self, share: float) -> None:
        self.share = share

    def _read(self) -> PositionsRead | None:
        read = None if torch.compiler.is_compiling() else _READ.get()
        return read if read is not None and read.worth(self.share) else None

    def gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace arguments that hold a state per position by the rows that are read."""
        read = self._read()
        if read is None:
            return None
        values = (*args, *kwargs.values())
        if not any(map(read.covers, values)):
            raise AdapterError(f"a {type(module).__name__} of the last layer is not called with the states of every position")
        taken = [read.gather(value) if read.covers(value) else value for value in values]
        return tuple(taken[: len(args)]), dict(zip(kwargs, taken[len(args) :], strict=True))

    def scatter(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Write the output rows back to their positions."""
        read = self._read()
        if read is None:
            return None
        if not (isinstance(out, Tensor) and out.shape[:-1] in ((1, len(read.index)), (len(read.index),))):
            raise AdapterError(f"a {type(module).__name__} of the last layer does not return one row per position")
        return read.scatter(out, flat=out.ndim == 2)

    def tell_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tell our attention function which queries are read, if documents are packed."""
        read = self._read()
        return None if read is None or kwargs.get("cu_seq_lens_q") is None else (args, {**kwargs, "positions_read": read})
