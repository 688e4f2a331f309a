"""Trained keys and values in front of the real ones, in the attention function itself: what prefix tuning and P-tuning v2 share.

::

    Prefix (at the model's root)           owns every trained tensor, one table a group of attentions
      ▲ points at
    PrefixedAttention (at each attention)  K ← [Pk ; K], V ← [Pv ; V], computed from the table in this very call
    ShiftedTrunk / ShiftedPositions        real tokens start at position P

Nothing is kept between calls and no cache is touched, so that recomputed layers, packed documents, beams and copies of the model need
nothing special. Keys are put in after rotation and stay unrotated, as those of HF peft and of the papers' code do.

Legend: P virtual tokens, b batch, g key heads, e head size, d width of the embedding, m width of the MLP, w = g·(key size + value size)
numbers of one attention for one virtual token: its keys, then its values, each (g, e).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.families import Facts, facts
from byway.core.families.positions import Positions, length_of, past_length
from byway.core.slots import Ref, SidePath, base_modules, muted, parent_path, slots
from byway.core.weights import device_of, features, is_conv, is_linear
from byway.errors import AdapterError, TargetError, listed, nearest

__all__ = ["Place", "Prefix", "PrefixedAttention", "Table", "groups", "shifts", "words"]

CROSS = "cross"
_CROSS = re.compile(r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)(\.|$)", re.IGNORECASE)
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_KEYS = ("k_proj", "key", "k", "k_lin", "key_proj")
_VALUES = ("v_proj", "value", "v", "v_lin", "value_proj")
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


@dataclass(frozen=True)
class Place:
    """One attention that receives a prefix."""

    path: str
    heads: int
    """g: key and value heads (of grouped-query attention those, not the query heads)."""
    key_size: int
    value_size: int
    inputs: int
    """Width of what its keys are made from."""

    @property
    def width(self) -> int:
        """w: numbers of its keys and values for one virtual token."""
        return self.heads * (self.key_size + self.value_size)


def groups(model: nn.Module, chosen: Sequence[str] | None) -> dict[str, tuple[Place, ...]]:
    """Group (a stack's name, or ``cross``) → its attentions in the order of the layers; `chosen`: which groups, None: all.

    Raises:
        TargetError: a group that the model does not have, or an attention whose heads cannot be told.
    """
    found = facts(model)
    every: dict[str, list[str]] = {}
    for path in found.require("attention_modules"):
        layer = found.layer_of(path)
        name = CROSS if _CROSS.search(path) else layer[0] if layer is not None else "layers"
        every.setdefault(name, []).append(path)
    unknown = [name for name in chosen or () if name not in every]
    if unknown:
        raise TargetError(
            f"attentions {unknown[0]!r}: {type(model).__name__} has no such attentions (there are: {listed(every)})",
            nearest(unknown[0], every),
        )
    return {name: tuple(_place(model, found, p) for p in paths) for name, paths in every.items() if chosen is None or name in chosen}


def _place(model: nn.Module, found: Facts, path: str) -> Place:
    """The sizes of one attention, from its own record of the size of a head and the outputs of its key and value maps."""
    module = model.get_submodule(path)
    known = vars(module)
    inputs = [features(linear)[0] for own, linear in base_modules(module) if own and is_linear(linear)]
    if {"num_heads", "qk_head_dim", "v_head_dim"} <= known.keys():  # latent attention (DeepSeek): keys and values differ in size
        return Place(path, known["num_heads"], known["qk_head_dim"], known["v_head_dim"], inputs[0])
    size = next((known[name] for name in _HEAD_SIZES if isinstance(known.get(name), int)), None)
    outputs: dict[str, int] = {}
    for own, linear in base_modules(module):
        leaf = own.rpartition(".")[2]
        if own and is_linear(linear) and leaf in found.fused and "k" in found.fused[leaf].parts:
            fused = found.fused[leaf]
            outputs |= {part: sum(stop - start for start, stop in fused.ranges(part)) for part in ("k", "v")}
        elif own and is_linear(linear):
            outputs |= {part: features(linear)[1] for part, names in (("k", _KEYS), ("v", _VALUES)) if leaf in names}
    if not size or len(outputs) < 2 or outputs["k"] % size or outputs["v"] % (outputs["k"] // size):
        raise TargetError(f"the number and size of the key heads of {path!r} ({type(module).__name__}) cannot be told from its structure")
    heads = outputs["k"] // size
    return Place(path, heads, size, outputs["v"] // heads, inputs[0])


class Table(nn.Module):
    """Keys and values of P virtual tokens for a group of attentions: stored (P, Σw), or made by an MLP from an embedding (P, d).

    With the MLP: embedding (P, d) → Linear(d, m) → tanh → Linear(m, w) for each attention, which together are the papers' Linear(m, Σw).
    `interleaved`: of L attentions, number i reads the entry 2i mod L, not its own.
    """

    def __init__(self, places: Sequence[Place], count: int, hidden: int | None, dtype: torch.dtype, *, interleaved: bool = False) -> None:
        super().__init__()
        self.places = tuple(places)
        self.order = tuple(2 * index % len(places) if interleaved else index for index in range(len(places)))
        self.starts = tuple(sum(place.width for place in places[:index]) for index in range(len(places) + 1))
        self.weight: nn.Parameter | None = None
        self.embedding: nn.Parameter | None = None
        if hidden is None:
            self.weight = nn.Parameter(torch.empty(count, self.starts[-1], dtype=dtype))
        else:
            width = places[0].inputs
            self.embedding = nn.Parameter(torch.empty(count, width, dtype=dtype))
            self.inner = nn.Linear(width, hidden, dtype=dtype)
            self.outer = nn.ModuleList(nn.Linear(hidden, place.width, dtype=dtype) for place in places)

    def row(self, index: int) -> Tensor:
        """(P, w) of one attention."""
        return self.entry(self.order[index])

    def entry(self, index: int) -> Tensor:
        """(P, w) as they are stored."""
        if self.weight is not None:
            return self.weight[:, self.starts[index] : self.starts[index + 1]]
        return self.outer[index](self.hidden())

    def hidden(self) -> Tensor:
        """(P, m): what the last linear maps read."""
        assert self.embedding is not None
        return torch.tanh(self.inner(self.embedding))

    def whole(self) -> Tensor:
        """(P, Σw) of the whole group; the parameter itself where it is stored so."""
        if self.weight is not None:
            return self.weight.detach()
        with torch.no_grad():
            return torch.cat([self.entry(index) for index in range(len(self.places))], dim=1)

    @torch.no_grad()
    def start(self, init: str, generator: torch.Generator, scale: float) -> None:
        """``zero``: all keys and values 0. Else N(0, `scale`²) where they are stored; an MLP from N(0, 1) and U(±1/√inputs)."""
        if self.weight is not None:
            drawn = torch.randn(self.weight.shape, dtype=self.weight.dtype, generator=generator) * scale
            self.weight.copy_(torch.zeros_like(drawn) if init == "zero" else drawn)
            return
        assert self.embedding is not None
        self.embedding.copy_(torch.randn(self.embedding.shape, dtype=self.embedding.dtype, generator=generator))
        for linear in (self.inner, *self.outer):
            assert isinstance(linear, nn.Linear)
            for tensor in (linear.weight, linear.bias):
                bound = linear.in_features**-0.5
                drawn = torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator)
                tensor.copy_(drawn * 0 if init == "zero" and linear is not self.inner else drawn)

    @torch.no_grad()
    def copy_rows(self, rows: Sequence[Tensor]) -> None:
        """Make :meth:`entry` give these (P, w): exactly where they are stored, by least squares through the MLP (exact for P ≤ m)."""
        for index, row in enumerate(rows):
            if self.weight is not None:
                self.weight[:, self.starts[index] : self.starts[index + 1]] = row.to(self.weight)
                continue
            linear = self.outer[index]
            assert isinstance(linear, nn.Linear)
            missing = row.to(linear.weight).double() - self.entry(index).double()
            linear.weight += (torch.linalg.pinv(self.hidden().double()) @ missing).T.to(linear.weight)


class Prefix(SidePath):
    """The trained tensors of every prefix of one adapter: one :class:`Table` a group, under the group's name."""

    def __init__(self, tables: dict[str, Table]) -> None:
        super().__init__()
        self.names = tuple(tables)
        for name, table in tables.items():
            self.add_module(name.replace(".", "_"), table)

    def table(self, group: str) -> Table:
        """The table of one group."""
        found = self._modules[group.replace(".", "_")]
        assert isinstance(found, Table)
        return found

    def export(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.table(self.names[0]).whole()} if len(self.names) == 1 else {}


class PrefixedAttention(SidePath):
    """K ← [Pk ; K] and V ← [Pv ; V] in one attention; owns no tensor itself.

    `earlier`: the attention whose table of relative distances also gives the prefix a bias, as P tokens before the text; None: bias 0.
    """

    def __init__(self, prefix: Prefix, group: str, index: int, *, dropout: float = 0.0, earlier: nn.Module | None = None) -> None:
        super().__init__()
        self.prefix = Ref(prefix)
        self.group = group
        self.index = index
        self.dropout = dropout
        self.earlier = None if earlier is None else Ref(earlier)

    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.prefix.module.parameters())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        prefix = self.prefix.module
        assert isinstance(prefix, Prefix)
        table = prefix.table(self.group)
        place, row = table.places[self.index], table.row(self.index).to(key.device)
        count, batch = row.shape[0], key.shape[0]
        split = place.heads * place.key_size
        keys = row[:, :split].reshape(count, place.heads, place.key_size).transpose(0, 1)
        values = row[:, split:].reshape(count, place.heads, place.value_size).transpose(0, 1)
        if bias is not None:
            bias = F.pad(bias, (count, 0)) if self.earlier is None else torch.cat([self._earlier(count, query, key, bias), bias], dim=-1)
        return (
            torch.cat([self._dropped(keys, batch).to(key.dtype), key], dim=2),  # (b, g, P + u, e)
            torch.cat([self._dropped(values, batch).to(value.dtype), value], dim=2),
            None if mask is None else F.pad(mask, (count, 0), value=True),
            bias,
        )

    def _dropped(self, states: Tensor, batch: int) -> Tensor:
        """(g, P, e) → (b, g, P, e), each row of the batch with a dropout of its own."""
        return F.dropout(states.expand(batch, -1, -1, -1), self.dropout, self.training)

    def _earlier(self, count: int, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """(1, h, t, P): the relative bias of P tokens right before the text."""
        assert self.earlier is not None
        module: Any = self.earlier.module
        t, u = query.shape[2], key.shape[2]
        whole = module.compute_bias(t, count + u, device=query.device, past_seen_tokens=count + u - t)
        return whole[..., :count].to(bias.dtype)


class ShiftedTrunk(SidePath):
    """Real tokens start at position P: ``position_ids`` + P, derived from the padding mask where none are given."""

    def __init__(self, trunk: nn.Module, count: int) -> None:
        super().__init__()
        self.positions = Positions.of(trunk)
        self.count = count

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given, limit = inputs.get("position_ids"), self.positions.limit
        if limit is not None and length_of(inputs) + self.count > limit:
            longest = length_of(inputs) if given is None else _span(given)
            if longest + self.count > limit:
                raise _too_long(longest, self.count, limit)
        if given is not None:
            return {**inputs, "position_ids": given + self.count}
        return {**inputs, "position_ids": self.positions.explicit(inputs, past_length(inputs)) + self.count}


class ShiftedPositions(SidePath):
    """The same at a table of positions, for stacks that number their tokens themselves (BART's encoder and decoder)."""

    def __init__(self, module: nn.Embedding, count: int) -> None:
        super().__init__()
        self.rows = module.num_embeddings
        self.count = count

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        first, given = next(iter(inputs)), inputs.get("position_ids")
        if given is not None:
            return {**inputs, "position_ids": self._moved(given)}
        if first == "input":  # a plain table: its only argument is the positions
            return {**inputs, first: self._moved(inputs[first])}
        return {**inputs, "past_key_values_length": inputs.get("past_key_values_length", 0) + self.count}

    def _moved(self, positions: Tensor) -> Tensor:
        if positions.shape[-1] + self.count > self.rows and _span(positions) + self.count > self.rows:
            raise _too_long(_span(positions), self.count, self.rows)
        return positions + self.count


def _span(positions: Tensor) -> int:
    """How many positions are used: of documents side by side in one row, those of the longest."""
    return int(positions.max() - positions.min()) + 1


def _too_long(tokens: int, count: int, limit: int) -> AdapterError:
    return AdapterError(
        f"{tokens} tokens after a prefix of {count} do not fit into the model's {limit} learned positions",
        f"use at most {limit - count} tokens, or a shorter prefix",
    )


def shifts(model: nn.Module, chosen: Sequence[str], count: int) -> Iterator[tuple[str, nn.Module, SidePath]]:
    """(path, module, side path) of what makes real tokens start at position `count` in every stack with a prefix of its own."""
    found = facts(model)
    if found.trunk is not None:
        trunk = model.get_submodule(found.trunk)
        if Positions.of(trunk).accepted:
            yield found.trunk, trunk, ShiftedTrunk(trunk, count)
            return
    for stack, runner in found.stack_modules.items():
        if stack in chosen:
            for path, module in _tables(model, found, stack, runner):
                yield path, module, ShiftedPositions(module, count)


def _tables(model: nn.Module, found: Facts, stack: str, runner: str) -> Iterator[tuple[str, nn.Embedding]]:
    """The tables of positions that belong to one stack: beside its layers, below what no other stack shares, and not over image patches."""
    others = [path for name, path in found.stack_modules.items() if name != stack]
    home = runner
    while home and not any(_below(other, parent_path(home)) for other in others):
        home = parent_path(home)
    for path, module in base_modules(model):
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES and _below(path, home):
            owner = model.get_submodule(parent_path(path))
            if not any(is_conv(part) for part in owner.children()):
                yield path, module


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def words(model: nn.Module, ids: Tensor, places: Sequence[Place]) -> dict[str, Tensor]:
    """Path → (P, w): the keys, rotated, and the values that the bare base has for the tokens `ids` (P)."""
    from byway.core.attention import recorded
    from byway.engine.attention.packing import packing

    given = {"input_ids": ids[None].to(device_of(model))}
    if facts(model).kind == "encoder-decoder":
        given["decoder_input_ids"] = given["input_ids"]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ExitStack() as stack:
            if any(slots(model)):
                stack.enter_context(muted(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(packing(model))
            found = stack.enter_context(recorded())
            model(**given)
    finally:
        for module, training in modes:
            module.training = training
    states = {place.path: found[id(model.get_submodule(place.path))] for place in places}
    return {path: torch.cat([s[0].transpose(0, 1).flatten(1) for s in pair], dim=1).cpu() for path, pair in states.items()}
