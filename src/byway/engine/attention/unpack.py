"""Padded rows outside the trunk, one packed row inside: packing for models whose head reads whole rows.

::

    ids (n, w) ── trunk ─ pack ─ embeddings ─ layers ─ unpack ── head
                          (1, T)   (1, T, d)   (1, T, d)   (n, w, d)

with n documents, w tokens of the longest and T tokens of all. A head may read the first token of a row, the last one
that is not padding, or a mean under the mask. So the model is called on the padded batch, and only from the start of
its trunk to the end of its last layer the rows are packed. Later modules see the padded batch, with zeros at padding.

An encoder-decoder packs its two sides with bounds of their own. Hooks tell each of its attentions which bounds are
those of its queries and which those of its keys.
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

__all__ = ["BOUNDS", "as_rows", "boundaries", "longest", "packed_pairs", "packed_rows"]

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The keys by which a packed batch names the bounds of its documents. Queries are a decoder's, keys an encoder's."""


@dataclass
class _Rows:
    """One forward pass on packed rows."""

    bounds: Mapping[str, Any]
    shape: tuple[int, int]
    """(n, w)"""
    index: Tensor
    """(T,): the position of each token in the flattened (n, w) table."""
    positions: Tensor
    """(1, T): positions that start from 0 in each document."""
    entered: bool = False
    left: bool = False

    def packed(self, table: Tensor) -> Tensor:
        """Return (n, w, ...) as (1, T, ...)."""
        return table.flatten(0, 1)[self.index][None]

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Return (1, T, ...) as (n, w, ...), with zeros at padding."""
        table = hidden.new_zeros((self.shape[0] * self.shape[1], *hidden.shape[2:]))
        return table.index_copy(0, self.index, hidden[0]).unflatten(0, self.shape)


_ROWS: ContextVar[_Rows | None] = ContextVar("byway_packed_rows", default=None)
_PAIRS: ContextVar[Mapping[str, Tensor] | None] = ContextVar("byway_packed_pairs", default=None)
"""Stack (``encoder``, ``decoder``) → its restarted positions (T,), in one forward pass on packed pairs."""
_REASON: ContextVar[str] = ContextVar("byway_why_rows_are_not_packed", default="documents can be packed inside packing(model) only")


@contextmanager
def packed_rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Wrap one forward pass inside ``packing(model)``; yields the model's arguments, those of the padded batch.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (n, w), padded on the right, and the bounds (:data:`BOUNDS`).

    Raises:
        AdapterError: the rows of this model cannot be packed.
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
    """Wrap one forward pass on packed pairs inside ``packing(model)``: positions restart in each document."""
    device = batch["input_ids"].device
    sides = {side: _places(batch[key])[1].to(device) for side, key in (("encoder", "cu_seq_lens_k"), ("decoder", "cu_seq_lens_q"))}
    token = _PAIRS.set(sides)
    try:
        yield
    finally:
        _PAIRS.reset(token)


def longest(batch: Mapping[str, Any]) -> int | None:
    """Return the tokens of the longest document of a packed batch, shared prefix included; None if unknown."""
    found = [batch[key] for key in ("max_length_q", "max_length_k") if key in batch]
    return max(found) if found else None


def _places(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the document of each token (T,) and its position in the document (T,), from bounds (documents + 1,)."""
    lengths = (starts[1:] - starts[:-1]).long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
    return document, torch.arange(len(document), device=starts.device) - starts.long()[document]


def as_rows(hidden: Tensor, like: Tensor) -> Tensor:
    """Return a side path's hidden state in the layout of `like`: (1, T, s) as (n, w, s) if `like` is unpacked."""
    # dynamo cannot read a ContextVar; compiled code never packs
    rows = None if torch.compiler.is_compiling() else _ROWS.get()
    if rows is None or hidden.shape[:2] == like.shape[:2]:
        return hidden
    return rows.unpacked(hidden)


@contextmanager
def boundaries(model: nn.Module) -> Iterator[None]:
    """Install within this context the hooks through which :func:`packed_rows` and :func:`packed_pairs` act."""
    found = facts(model)
    handles: list[RemovableHandle] = []
    reason = _refusal(found)
    if not reason:
        trunk = model.get_submodule(found.require("trunk"))
        (runner,) = found.stack_modules.values()
        names = tuple(inspect.signature(type(trunk).forward).parameters)[1:]
        enter = functools.partial(_enter, names=names, first=found.first_position)
        # before all other hooks of the trunk: its side paths see the packed row
        handles.append(trunk.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        # after all other hooks of the stack: what a ladder adds is unpacked too
        handles.append(model.get_submodule(runner).register_forward_hook(_leave))
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
    """Return why rows of a model cannot be packed; ``""`` if they can."""
    if not found.attention_registry:
        return "its attention does not go through transformers' registry, so its rows cannot be packed"
    if len(found.stacks) != 1:
        return f"it has {len(found.stacks) or 'no known'} stacks of layers; rows can be packed through one"
    return "" if found.trunk is not None else "its trunk is not known, so its rows cannot be packed"


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...], first: int) -> Any:
    rows = _ROWS.get()
    if rows is None:
        return None
    inputs = dict(zip(names, args, strict=False)) | kwargs
    if inputs.get("inputs_embeds") is not None:
        raise AdapterError("the trunk is given embeddings instead of token ids, which cannot be packed", "call it on padded rows")
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
    """Hooks that give every attention (a ladder's too) its own bounds, and every table of positions restarted ones."""
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
    positions = _PAIRS.get()
    return None if positions is None else (args, {**kwargs, "position_ids": positions[side]})
