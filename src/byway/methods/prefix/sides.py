"""Trained keys and values in front of the real ones, added inside the attention function.

::

    Prefix (at the model's root)           owns every trained tensor, one table per group of attentions
      ▲ refers to
    PrefixedAttention (at each attention)  K ← [Pk ; K], V ← [Pv ; V], computed from the table in every call
    ShiftedTrunk / ShiftedPositions        real tokens start at position P

No state is kept between calls and no cache is touched, so recomputed layers, packed documents, beams and copies of the
model need no special handling. Keys are inserted after rotation and are not rotated, as in HF peft and the papers'
code.

Notation: P virtual tokens, b batch, g key heads, e head size, d width of the embedding, m width of the MLP,
w = g·(key size + value size), the values of one virtual token in one attention: keys, then values, each (g, e).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.families.attentions import KeyValueHeads, is_cross_attention, key_value_heads
from byway.core.families.positions import Positions, length_of, past_length, position_tables
from byway.core.modes import evaluating
from byway.core.slots import ModuleRef, SidePath, muted, slots
from byway.core.weights import device_of
from byway.errors import AdapterError, TargetError, listed, nearest

__all__ = ["CROSS", "Prefix", "PrefixedAttention", "Table", "base_states", "groups", "shifts"]

CROSS = "cross"


def groups(model: nn.Module, chosen: Sequence[str] | None) -> dict[str, tuple[KeyValueHeads, ...]]:
    """Return group (a stack's name, or ``cross``) → its attentions in layer order; only the `chosen` groups, if given.

    Raises:
        TargetError: the model has no such group, or the heads of an attention cannot be determined.
    """
    found = facts(model)
    every: dict[str, list[str]] = {}
    for path in found.require("attention_modules"):
        layer = found.layer_of(path)
        name = CROSS if is_cross_attention(path) else layer[0] if layer is not None else "layers"
        every.setdefault(name, []).append(path)
    unknown = [name for name in chosen or () if name not in every]
    if unknown:
        raise TargetError(
            f"attentions: {unknown[0]!r}: {type(model).__name__} has no such attentions (there are: {listed(every)})",
            nearest(unknown[0], every),
        )
    return {
        name: tuple(key_value_heads(model, found, p) for p in paths) for name, paths in every.items() if chosen is None or name in chosen
    }


class Table(nn.Module):
    """Keys and values of P virtual tokens for a group of attentions.

    They are stored (P, Σw), or computed by an MLP: embedding (P, d) → Linear(d, m) → tanh → Linear(m, w) for each
    attention, which together are the papers' Linear(m, Σw).
    `interleaved`: of L attentions, number i reads entry 2i mod L, not its own.
    """

    def __init__(
        self, places: Sequence[KeyValueHeads], count: int, hidden: int | None, dtype: torch.dtype, *, interleaved: bool = False
    ) -> None:
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
        """Return the (P, w) that one attention reads."""
        return self.entry(self.order[index])

    def entry(self, index: int) -> Tensor:
        """Return (P, w) in storage order."""
        if self.weight is not None:
            return self.weight[:, self.starts[index] : self.starts[index + 1]]
        return self.outer[index](self.hidden())

    def hidden(self) -> Tensor:
        """Return (P, m), the input of the last linear maps."""
        assert self.embedding is not None
        return torch.tanh(self.inner(self.embedding))

    def whole(self) -> Tensor:
        """Return (P, Σw) of the whole group, detached."""
        if self.weight is not None:
            return self.weight.detach()
        with torch.no_grad():
            return torch.cat([self.entry(index) for index in range(len(self.places))], dim=1)

    @torch.no_grad()
    def initialize(self, init: str, generator: torch.Generator, scale: float) -> None:
        """Set keys and values to 0 (``zero``), or draw them from N(0, `scale`²).

        With an MLP, the embedding is drawn from N(0, 1) and its maps from U(±1/√inputs).
        """
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
        """Set the entries to these (P, w): exactly if stored, by least squares through the MLP (exact for P ≤ m)."""
        for index, row in enumerate(rows):
            if self.weight is not None:
                self.weight[:, self.starts[index] : self.starts[index + 1]] = row.to(self.weight)
                continue
            linear = self.outer[index]
            assert isinstance(linear, nn.Linear)
            missing = row.to(linear.weight).double() - self.entry(index).double()
            linear.weight += (torch.linalg.pinv(self.hidden().double()) @ missing).T.to(linear.weight)


class Prefix(SidePath):
    """The trained tensors of all prefixes of one adapter: one :class:`Table` per group, under the group's name."""

    def __init__(self, tables: dict[str, Table]) -> None:
        super().__init__()
        self.names = tuple(tables)
        for name, table in tables.items():
            self.add_module(name.replace(".", "_"), table)

    def table(self, group: str) -> Table:
        """Return the table of one group."""
        found = self._modules[group.replace(".", "_")]
        assert isinstance(found, Table)
        return found

    def export(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.table(self.names[0]).whole()} if len(self.names) == 1 else {}


class PrefixedAttention(SidePath):
    """K ← [Pk ; K] and V ← [Pv ; V] in one attention; owns no tensor itself.

    `earlier`: the attention whose relative position bias also applies to the prefix, as P tokens before the text;
    None: bias 0.
    """

    def __init__(self, prefix: Prefix, group: str, index: int, *, dropout: float = 0.0, earlier: nn.Module | None = None) -> None:
        super().__init__()
        self.prefix = ModuleRef(prefix)
        self.group = group
        self.index = index
        self.dropout = dropout
        self.earlier = None if earlier is None else ModuleRef(earlier)

    def needs_gradient(self) -> bool:
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
        """Return (g, P, e) as (b, g, P, e), with separate dropout for each row of the batch."""
        return F.dropout(states.expand(batch, -1, -1, -1), self.dropout, self.training)

    def _earlier(self, count: int, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Return (1, h, t, P), the relative position bias of P tokens right before the text."""
        assert self.earlier is not None
        module: Any = self.earlier.module
        t, u = query.shape[2], key.shape[2]
        whole = module.compute_bias(t, count + u, device=query.device, past_seen_tokens=count + u - t)
        return whole[..., :count].to(bias.dtype)


class ShiftedTrunk(SidePath):
    """Real tokens start at position P: ``position_ids`` + P, computed from the padding mask if none are given."""

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
    """The same shift on an embedding of positions, for stacks that compute position ids themselves (BART)."""

    def __init__(self, module: nn.Embedding, count: int) -> None:
        super().__init__()
        self.rows = module.num_embeddings
        self.count = count

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        first, given = next(iter(inputs)), inputs.get("position_ids")
        if given is not None:
            return {**inputs, "position_ids": self._moved(given)}
        if first == "input":  # a plain nn.Embedding: its only argument is the positions
            return {**inputs, first: self._moved(inputs[first])}
        return {**inputs, "past_key_values_length": inputs.get("past_key_values_length", 0) + self.count}

    def _moved(self, positions: Tensor) -> Tensor:
        if positions.shape[-1] + self.count > self.rows and _span(positions) + self.count > self.rows:
            raise _too_long(_span(positions), self.count, self.rows)
        return positions + self.count


def _span(positions: Tensor) -> int:
    """Return the number of positions in use; of several documents in one row, those of the longest."""
    return int(positions.max() - positions.min()) + 1


def _too_long(tokens: int, count: int, limit: int) -> AdapterError:
    return AdapterError(
        f"{tokens} tokens after a prefix of {count} do not fit into the model's {limit} learned positions",
        f"use at most {limit - count} tokens, or a shorter prefix",
    )


def shifts(model: nn.Module, chosen: Sequence[str], count: int) -> Iterator[tuple[str, nn.Module, SidePath]]:
    """Yield (path, module, side path) so that real tokens start at position `count` in every stack with a prefix."""
    found = facts(model)
    if found.trunk is not None:
        trunk = model.get_submodule(found.trunk)
        if Positions.of(trunk).accepted:
            yield found.trunk, trunk, ShiftedTrunk(trunk, count)
            return
    for stack in found.stack_modules:
        if stack in chosen:
            for path, module in position_tables(model, found, stack):
                yield path, module, ShiftedPositions(module, count)


def base_states(model: nn.Module, ids: Tensor, places: Sequence[KeyValueHeads]) -> dict[str, Tensor]:
    """Return path → (P, w): the rotated keys, and the values, that the bare base computes for the tokens `ids` (P)."""
    from byway.core.attention import recorded
    from byway.engine.attention.packing import packing

    given = {"input_ids": ids[None].to(device_of(model))}
    if facts(model).kind == "encoder-decoder":
        given["decoder_input_ids"] = given["input_ids"]
    quiet = muted(model) if any(slots(model)) else nullcontext()
    with evaluating(model), quiet, torch.no_grad(), packing(model), recorded() as found:
        model(**given)
    states = {place.path: found[id(model.get_submodule(place.path))] for place in places}
    return {path: torch.cat([s[0].transpose(0, 1).flatten(1) for s in pair], dim=1).cpu() for path, pair in states.items()}
