"""The attention of many short documents in a few products: documents of similar length side by side in one table.

One call a document costs what its launches cost, not what it computes: 32 rows of SST-2 are 32 calls of some 13 tokens, and under dropout
each is a dozen operations. Here the documents of a pack are put into a few tables by length, (n, L) with L the longest of its group, and
forward and backward are written down for a whole table.

    S = s·QKᵀ (−∞ where u is no key of the document)    P = softmax(S)    D = P∘M/(1−p), M keeps with 1 − p    O = DV
    ∂V = Dᵀ∂O    ∂P = (∂O Vᵀ)∘M/(1−p)    ∂S = P∘(∂P − Σᵤ ∂P∘P)    ∂Q = s·∂S K    ∂K = s·∂Sᵀ Q

Legend: h heads, T tokens of the pack, e head size, n documents of a group, L tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["LONGEST", "attended", "suits"]

LONGEST = 64
"""Tokens: with longer documents one call for each is faster (seen on a CPU with heads of 8 to 64)."""
_PADDED = 2.0
"""A table holds at most so many times the pairs of its documents …"""
_FIXED = 2500
"""… and so many pairs more, which is what another table would cost."""


class _Group(NamedTuple):
    """Documents of similar length."""

    places: Tensor
    """(n·L,): the place in the pack of each place in the table; a document's last token where it has none."""
    unseen: Tensor | None
    """(n, L): where the table has padding; None: nowhere."""
    documents: int
    """n"""


def suits(lengths: Sequence[int]) -> bool:
    """Whether documents of these lengths are better attended in tables."""
    return len(lengths) > 1 and max(lengths) <= LONGEST


def attended(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, causal: bool, dropout: float) -> Tensor:
    """(h, T, e): what each of the documents of `lengths`, side by side in (h, T, e), gives by itself."""
    groups, back = _grouped(lengths, query.device)
    return _Tables.apply(query, key, value, groups, back, scale, causal, dropout)


def _grouped(lengths: Sequence[int], device: torch.device) -> tuple[list[_Group], Tensor]:
    """The groups, and for each token of the pack its place among all tables, one after the other."""
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
        unseen = place >= own_length  # (n, L)
        index = (begin[group][:, None] + torch.minimum(place, own_length - 1)).flatten()
        real = (~unseen).flatten().nonzero().flatten()
        back[index[real]] = done + real
        done += len(index)
        found.append(_Group(index.to(device), unseen.to(device) if bool(unseen.any()) else None, len(group)))
    return found, back.to(device)


class _Tables(torch.autograd.Function):
    """Kept for the backward pass: Q, K, V, P and the dropout's mask of each table."""

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
            if group.unseen is not None:  # a document's last token stands in its padding too
                do.view(len(out), group.documents, *do.shape[1:]).masked_fill_(group.unseen[None, :, :, None], 0)
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
    return states.index_select(1, group.places).view(len(states) * group.documents, -1, states.shape[2])


def _bias(group: _Group, like: Tensor, heads: int, causal: bool) -> Tensor:
    """What is added to the scores, (1 or h·n, 1 or L, L): −∞ for what is no key of a document, or comes after the query."""
    length = like.shape[1]
    bias = like.new_zeros((1, 1, length))
    if causal:
        bias = like.new_full((1, length, length), -torch.inf).triu_(1)
    if group.unseen is None:
        return bias
    padded = like.new_zeros((group.documents, 1, length)).masked_fill_(group.unseen[:, None], -torch.inf)
    return (bias + padded).expand(heads, -1, -1, -1).flatten(0, 1)
