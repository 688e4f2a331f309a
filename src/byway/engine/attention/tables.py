"""The attention of many short documents in a few matrix products: documents of similar length share one padded table.

One call per document costs its kernel launches, not its arithmetic: 32 rows of SST-2 are 32 calls on about 13 tokens
each, and with dropout each call is a dozen operations. Here the documents of a pack are grouped by length into a few
tables (n, L), with L the longest of its group, and forward and backward pass are written out for a whole table.

    S = s·QKᵀ (−∞ where u is not a key of the document)    P = softmax(S)    D = P∘M/(1−p), M keeps with 1 − p    O = DV
    ∂V = Dᵀ∂O    ∂P = (∂O Vᵀ)∘M/(1−p)    ∂S = P∘(∂P − Σᵤ ∂P∘P)    ∂Q = s·∂S K    ∂K = s·∂Sᵀ Q

Saved for the backward pass: Q, K, V, P and M of each table.

Shapes: h heads, T tokens of the pack, e head size, n documents of a group, L tokens of its longest document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["LONGEST", "attended", "suits"]

LONGEST = 64
"""Longest document in tokens; beyond it one call per document is faster (measured on a CPU, head sizes 8 to 64)."""
_PADDED = 2.0
"""A table holds at most so many times as many (query, key) pairs as its documents have …"""
_FIXED = 2500
"""… plus this many pairs, which is what another table would cost."""


class _Group(NamedTuple):
    """Documents of similar length."""

    positions: Tensor
    """(n·L,): the position in the pack of each entry of the table; padding repeats the document's last token."""
    padding: Tensor | None
    """(n, L): True where the table has padding; None if it has none."""
    documents: int
    """n"""


def suits(lengths: Sequence[int]) -> bool:
    """True if tables are the faster way for documents of these lengths."""
    return len(lengths) > 1 and max(lengths) <= LONGEST


def attended(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, causal: bool, dropout: float) -> Tensor:
    """Return the attention output (h, T, e) of documents of `lengths`, side by side in (h, T, e)."""
    groups, back = _grouped(lengths, query.device)
    return _Tables.apply(query, key, value, groups, back, scale, causal, dropout)


def _grouped(lengths: Sequence[int], device: torch.device) -> tuple[list[_Group], Tensor]:
    """Return the groups, and the position (T,) of each token of the pack in the concatenated tables."""
    groups: list[list[int]] = []
    pairs = 0
    for document in sorted(range(len(lengths)), key=lengths.__getitem__):
        own = lengths[document] ** 2
        if not groups or (len(groups[-1]) + 1) * own > _PADDED * (pairs + own) + _FIXED:
            groups.append([])
            pairs = 0
        groups[-1].append(document)
        pairs += own
    length = torch.tensor(lengths)
    begin = length.cumsum(0) - length
    back, done, found = torch.empty(int(length.sum()), dtype=torch.long), 0, []
    for group in groups:
        own_length = length[group][:, None]  # (n, 1)
        place = torch.arange(int(own_length.max()))
        padding = place >= own_length  # (n, L)
        index = (begin[group][:, None] + torch.minimum(place, own_length - 1)).flatten()
        real = (~padding).flatten().nonzero().flatten()
        back[index[real]] = done + real
        done += len(index)
        found.append(_Group(index.to(device), padding.to(device) if bool(padding.any()) else None, len(group)))
    return found, back.to(device)


class _Tables(torch.autograd.Function):
    """The equations above, for all tables of a pack."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: list[_Group], back: Tensor, scale: float, causal: bool, dropout: float
    ) -> Tensor:
        heads = len(query)
        kept: list[Tensor] = []
        outs: list[Tensor] = []
        for group in groups:
            q, k, v = (_table(states, group) for states in (query, key, value))  # (h·n, L, e)
            p = torch.baddbmm(_bias(group, q, heads, causal), q, k.transpose(1, 2), alpha=scale).softmax(-1)
            mask = torch.rand_like(p).ge_(dropout).mul_(1 / (1 - dropout)) if dropout else p.new_empty(0)
            outs.append(torch.bmm(p * mask if dropout else p, v).view(heads, -1, v.shape[2]))
            kept += (q, k, v, p, mask)
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.back, ctx.scale, ctx.dropout = groups, back, scale, dropout
        return torch.cat(outs, dim=1).index_select(1, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (out,) = gradients  # (h, T, e)
        found: tuple[list[Tensor], ...] = ([], [], [])
        for number, group in enumerate(ctx.groups):
            q, k, v, p, mask = ctx.saved_tensors[5 * number : 5 * number + 5]
            do = _table(out, group)
            if group.padding is not None:  # padding repeats the last token, whose gradient must count once
                do.view(len(out), group.documents, *do.shape[1:]).masked_fill_(group.padding[None, :, :, None], 0)
            dp = torch.bmm(do, v.transpose(1, 2))
            dv = torch.bmm((p * mask if ctx.dropout else p).transpose(1, 2), do)
            if ctx.dropout:
                dp.mul_(mask)
            dp.mul_(p)
            ds = dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
            for states, table in zip(found, (torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv), strict=True):
                states.append(table.view(len(out), -1, table.shape[-1]))
        dq, dk, dv = (torch.cat(tables, dim=1).index_select(1, ctx.back) for tables in found)
        return dq, dk, dv, None, None, None, None, None


def _table(states: Tensor, group: _Group) -> Tensor:
    """(h, T, e) → (h·n, L, e)."""
    return states.index_select(1, group.positions).view(len(states) * group.documents, -1, states.shape[2])


def _bias(group: _Group, like: Tensor, heads: int, causal: bool) -> Tensor:
    """Return the mask added to the scores, (1 or h·n, 1 or L, L): −∞ at padding and, if causal, at later keys."""
    length = like.shape[1]
    bias = like.new_zeros((1, 1, length))
    if causal:
        bias = like.new_full((1, length, length), -torch.inf).triu_(1)
    if group.padding is None:
        return bias
    padded = like.new_zeros((group.documents, 1, length)).masked_fill_(group.padding[:, None], -torch.inf)
    return (bias + padded).expand(heads, -1, -1, -1).flatten(0, 1)
