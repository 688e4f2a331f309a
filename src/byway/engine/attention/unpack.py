"""Rows outside, one packed row inside: where documents are laid side by side for a model whose head reads rows, and where they part again.

::

    ids (n, w) ── trunk ─ pack ─ embeddings ─ layers ─ unpack ── head        n documents, w tokens of the longest, T of all together
                          (1, T)   (1, T, d)   (1, T, d)   (n, w, d)

A head takes what it wants: the first token of a row, the last that is no padding, a mean under the mask. So the model is called on the
padded batch, and only from the entrance of its trunk to the end of its last layer is there no padding. What lies behind sees the shapes,
ids and mask that it would have seen, with zeros where padding is.

An encoder-decoder packs its two sides by bounds of their own; each of its attentions is told here which of them are its queries' and
which its keys'.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from byway.core.families import Facts, facts
from byway.errors import AdapterError

__all__ = ["BOUNDS", "as_rows", "boundaries", "longest", "packed_pairs", "packed_rows", "restarted"]

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How a packed batch says where its documents lie; an encoder-decoder's queries are the decoder's tokens, its keys the encoder's."""


@dataclass
class _Rows:
    """One forward of packed rows."""

    bounds: Mapping[str, Any]
    shape: tuple[int, int]
    """(n, w)"""
    index: Tensor
    """(T,): the place of each token in the (n, w) table, read row by row."""
    positions: Tensor
    """(1, T): from 0 in each document."""
    entered: bool = False
    left: bool = False

    def packed(self, table: Tensor) -> Tensor:
        """(n, w, ...) → (1, T, ...)."""
        return table.flatten(0, 1)[self.index][None]

    def unpacked(self, hidden: Tensor) -> Tensor:
        """(1, T, ...) → (n, w, ...), zero where padding is."""
        table = hidden.new_zeros((self.shape[0] * self.shape[1], *hidden.shape[2:]))
        return table.index_copy(0, self.index, hidden[0]).unflatten(0, self.shape)


@dataclass(frozen=True)
class _Pairs:
    """One forward of an encoder-decoder on packed pairs: restarted positions of the two sides, (T,) each."""

    positions: Mapping[str, Tensor]


_ROWS: ContextVar[_Rows | None] = ContextVar("byway_packed_rows", default=None)
_PAIRS: ContextVar[_Pairs | None] = ContextVar("byway_packed_pairs", default=None)
_REASON: ContextVar[str] = ContextVar("byway_why_rows_are_not_packed", default="documents are packed inside packing(model) only")


@contextmanager
def packed_rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Around one forward, inside ``packing(model)``: the arguments to call the model with, which are those of the padded batch.

    `batch`: ``input_ids`` and ``attention_mask`` (n, w) padded on the right, and the bounds of :data:`BOUNDS`.

    Raises:
        AdapterError: this model's rows cannot be packed.
    """
    reason = _REASON.get()
    if reason:
        raise AdapterError(reason, "call it on padded rows")
    starts, shape = batch["cu_seq_lens_q"], batch["input_ids"].shape
    document, positions = (places.to(batch["input_ids"].device) for places in _places(starts))
    bounds = {key: batch[key] for key in BOUNDS if key in batch}
    rows = _Rows(bounds, (shape[0], shape[1]), document * shape[1] + positions, positions[None])
    token = _ROWS.set(rows)
    try:
        yield {key: value for key, value in batch.items() if key not in BOUNDS}
    finally:
        _ROWS.reset(token)
    if not (rows.entered and rows.left):
        raise AdapterError("the model does not run its trunk as one module, so its rows cannot be packed", "call it on padded rows")


@contextmanager
def packed_pairs(batch: Mapping[str, Any]) -> Iterator[None]:
    """Around one forward of an encoder-decoder on packed pairs, inside ``packing(model)``: tables of positions start anew with each."""
    device = batch["input_ids"].device
    sides = {side: restarted(batch[key]).to(device) for side, key in (("encoder", "cu_seq_lens_k"), ("decoder", "cu_seq_lens_q"))}
    token = _PAIRS.set(_Pairs(sides))
    try:
        yield
    finally:
        _PAIRS.reset(token)


def longest(batch: Mapping[str, Any]) -> int | None:
    """The tokens of the longest document of a packed batch, a common head included; None: not said."""
    found = [batch[key] for key in ("max_length_q", "max_length_k") if key in batch]
    return max(found) if found else None


def restarted(starts: Tensor) -> Tensor:
    """Bounds (documents + 1,) → positions (T,) from 0 in each document."""
    return _places(starts)[1]


def _places(starts: Tensor) -> tuple[Tensor, Tensor]:
    """The document and the position in it of each token, (T,) each."""
    lengths = (starts[1:] - starts[:-1]).long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
    return document, torch.arange(len(document), device=starts.device) - starts.long()[document]


def as_rows(hidden: Tensor, like: Tensor) -> Tensor:
    """What a side path made between the layers, (1, T, s), in the rows of `like` if that comes from behind them; else as it is."""
    # dynamo cannot read a ContextVar; nothing is packed in compiled code
    rows = None if torch.compiler.is_compiling() else _ROWS.get()
    if rows is None or hidden.shape[:2] == like.shape[:2]:
        return hidden
    return rows.unpacked(hidden)


@contextmanager
def boundaries(model: nn.Module) -> Iterator[None]:
    """Within this context the places where rows and packs meet are watched; :func:`packed_rows` and :func:`packed_pairs` act there."""
    found = facts(model)
    handles: list[RemovableHandle] = []
    reason = _refusal(found)
    if not reason:
        handles += _around_trunk(model, found)
    if found.kind == "encoder-decoder":
        handles += _in_pairs(model, found)
    token = _REASON.set(reason)
    try:
        yield
    finally:
        _REASON.reset(token)
        for handle in handles:
            handle.remove()


def _refusal(found: Facts) -> str:
    if not found.attention_registry:
        return "its attention does not go through transformers' registry, so its rows cannot be packed"
    if len(found.stacks) != 1:
        return f"it has {len(found.stacks) or 'no known'} stacks of layers; rows are packed through one"
    return "" if found.trunk is not None else "where its trunk begins is not known, so its rows cannot be packed"


def _around_trunk(model: nn.Module, found: Facts) -> list[RemovableHandle]:
    trunk = model.get_submodule(found.require("trunk"))
    (runner,) = found.stack_modules.values()
    names = tuple(inspect.signature(type(trunk).forward).parameters)[1:]
    enter = functools.partial(_enter, names=names, first=found.first_position)
    return [
        # before every other hook of the trunk: what hangs there sees one packed row
        trunk.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        # after every other hook of the stack: a ladder's answer is unpacked as well
        model.get_submodule(runner).register_forward_hook(_leave),
    ]


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...], first: int) -> Any:
    rows = _ROWS.get()
    if rows is None:
        return None
    inputs = dict(zip(names, args, strict=False)) | kwargs
    if inputs.get("inputs_embeds") is not None:
        raise AdapterError("something gives the trunk embeddings instead of tokens, which are not packed", "call it on padded rows")
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == rows.shape:
            inputs[name] = rows.packed(value)
    inputs["attention_mask"] = None
    if "position_ids" in names:
        inputs["position_ids"] = rows.positions + first
    rows.entered = True
    return (), {**inputs, **rows.bounds}


def _leave(module: nn.Module, args: Any, out: Any) -> Any:
    rows = _ROWS.get()
    if rows is None:
        return None
    rows.left = True
    if isinstance(out, Tensor):
        return rows.unpacked(out)
    if isinstance(out, tuple):
        return (rows.unpacked(out[0]), *out[1:])
    out.last_hidden_state = rows.unpacked(out.last_hidden_state)
    return out


def _in_pairs(model: nn.Module, found: Facts) -> list[RemovableHandle]:
    """Every attention is told its own bounds, a ladder's too; every table of positions gets restarted ones."""
    handles = []
    kinds = {type(model.get_submodule(path)) for path in found.attention_modules}
    encoder = found.stack_modules.get("encoder", "")
    for path, module in model.named_modules():
        if type(module) in kinds:
            side = functools.partial(_own_bounds, encoder=path.startswith(f"{encoder}."))
            handles.append(module.register_forward_pre_hook(side, with_kwargs=True))
    for side, runner in found.stack_modules.items():
        for module in model.get_submodule(runner).children():
            names = inspect.signature(type(module).forward).parameters
            if isinstance(module, nn.Embedding) and "position_ids" in names:
                handles.append(module.register_forward_pre_hook(functools.partial(_own_positions, side=side), with_kwargs=True))
    return handles


def _own_bounds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, encoder: bool) -> Any:
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if queries is None or keys is None:
        return None
    if encoder:
        queries = keys
    elif kwargs.get("key_value_states") is None:
        keys = queries
    return args, {**kwargs, "cu_seq_lens_q": queries, "cu_seq_lens_k": keys}


def _own_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, side: str) -> Any:
    pairs = _PAIRS.get()
    return None if pairs is None else (args, {**kwargs, "position_ids": pairs.positions[side]})
