"""The attention of packed documents: each by itself, in as few calls as there are ways to.

A plain call is :func:`attend`: side paths with :meth:`~byway.core.slots.SidePath.attend` rewrite its keys, values, mask and position bias.
A pack is attended by :func:`attend_documents`, which takes the first that fits of

* behind common heads of documents: each segment with its stretches of the row and itself as keys; all in one call on a GPU;
* few queries that anybody reads, one of each document: all in one call with a table of keys;
* short documents on a CPU: a few tables (:mod:`byway.engine.attention.tables`);
* any documents on a GPU, in 16 bits, without dropout: all in one call (:mod:`byway.engine.attention.varlen`);
* one call for each document.

Legend: b batch, h heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byway.core.attention import Call, as_additive
from byway.engine.attention import tables as short_documents
from byway.engine.attention import varlen
from byway.engine.backward.recompute import again
from byway.errors import AdapterError

if TYPE_CHECKING:
    from byway.engine.last_layer import Read

__all__ = ["attend_documents"]

_TABLE = 4
"""Keys of documents with one query each go into a table that is at most so many times larger than they are."""

Span = tuple[int, int]


def attend_documents(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    starts: tuple[Any, Any],
    before: Sequence[Sequence[Span]] | None = None,
    read: Read | None = None,
) -> Tensor:
    """(b, t, h, e): what each document's queries see of its keys.

    Args:
        call: sdpa or eager.
        query: (b, h, t, e), documents side by side; `key`, `value` (b, g, u, e).
        mask: of the whole pack, where attention is local; a document's part of it is its own.
        starts: where documents begin among the queries and, last, their total; the same of the keys (None: as the queries).
        before: for each document the stretches of the row that stand before it (a head in common with others).
        read: the queries that anybody reads; None: all.
    """
    spans = _spans(*starts, query.shape[2], key.shape[2])
    if before is not None:
        return _continued(call, query, key, value, mask, [own for own, _ in spans], before)
    biased = mask is not None or call.options.get("position_bias") is not None
    chosen = None if read is None or biased else read.counts([end for (_, end), _ in spans], call.causal)
    if read is not None and chosen is not None:
        return _at_queries(call, query, key, value, spans, chosen, read)
    if not biased and call.bare:
        at_once = _in_tables(call, query, key, value, spans)
        at_once = _in_one_call(call, query, key, value, spans) if at_once is None else at_once
        if at_once is not None:
            return at_once
    return _one_by_one(call, query, key, value, mask, spans)


def _one_by_one(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spans: list[tuple[Span, Span]]) -> Tensor:
    outs = []
    window, bias = call.options.get("sliding_window"), call.options.get("position_bias")
    # split, not sliced: the gradient of a slice is a tensor of the whole pack's size, mostly zeros
    queries = query.split([b - a for (a, b), _ in spans], dim=2)
    keys, values = (kept.split([d - c for _, (c, d) in spans], dim=2) for kept in (key, value))
    for number, ((a, b), (c, d)) in enumerate(spans):
        own = {} if bias is None else {"position_bias": bias[:, :, a:b, c:d]}
        # a mask that is there (sliding window) depends on distances only; a document shorter than the window needs none
        within = window is not None and d - c < window
        seen = None if mask is None or within else mask[:, :, a:b, c:d]
        if seen is None and call.eager and call.causal and b - a > 1:
            seen = as_additive(torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).tril()[None, None], query.dtype)
        outs.append(call.plain(queries[number], keys[number], values[number], seen, **own))
    out = torch.cat(outs, dim=1)  # (b, t, h, e)
    if out.requires_grad and not torch.compiler.is_compiling():
        kept = [each.detach() for each in outs]  # autograd keeps what attention gave
        again(out, lambda: torch.cat(kept, dim=1))
    return out


def _in_tables(call: Call, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[Span, Span]]) -> Tensor | None:
    """(b, t, h, e): the attention of short documents in a few products; None where it is better done otherwise."""
    usual = query.shape[0] == 1 and query.shape[:3] == key.shape[:3] and all(own == other for own, other in spans)
    if not usual or not query.requires_grad:
        return None
    lengths = [b - a for (a, b), _ in spans]
    # elsewhere nothing was measured
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or not short_documents.suits(lengths):
        return None
    dropout = call.options.get("dropout") or 0.0
    out = short_documents.attended(query[0], key[0], value[0], lengths, scale=call.scale(query), causal=call.causal, dropout=dropout)
    return out.transpose(0, 1)[None]


def _in_one_call(call: Call, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[Span, Span]]) -> Tensor | None:
    """(1, t, h, e): all documents in one call of a kernel that takes their bounds; None where there is none."""
    if len(spans) == 1 or not varlen.suits(query, key, value, dropout=call.options.get("dropout") or 0.0):
        return None
    queries, keys = [b - a for (a, b), _ in spans], [d - c for _, (c, d) in spans]
    return varlen.attended(query, key, value, queries, keys, scale=call.scale(query), causal=call.causal)


def _at_queries(
    call: Call, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[Span, Span]], counts: list[int], read: Read
) -> Tensor:
    """(b, t, h, e): the attention of the queries that are read, `counts` of each document; zeros for the others."""
    chosen = query.index_select(2, read.index.to(query.device))
    lengths = [d - c for _, (c, d) in spans]
    if set(counts) == {1} and len(counts) * max(lengths) <= _TABLE * key.shape[2]:
        # one call for all documents: a query each, the keys in a table
        places = torch.arange(max(lengths), device=key.device)
        ends = torch.tensor([d for _, (_, d) in spans], device=key.device)
        index = ends[:, None] - torch.tensor(lengths, device=key.device)[:, None] + places  # (n, u)
        seen = (index < ends[:, None])[:, None, None]
        flat = index.clamp(max=key.shape[2] - 1).flatten()
        k, v = (kept[0].index_select(1, flat).unflatten(1, index.shape).transpose(0, 1) for kept in (key, value))  # (n, g, u, e)
        out = call.plain(
            chosen[0].transpose(0, 1)[:, :, None], k, v, as_additive(seen, query.dtype) if call.eager else seen
        )  # (n, 1, h, e)
        return read.laid_back(out.transpose(0, 1))
    asked = chosen.split(counts, dim=2)
    keys, values = (kept.split(lengths, dim=2) for kept in (key, value))
    outs = [call.plain(q, k, v, None) for q, k, v in zip(asked, keys, values, strict=True) if q.shape[2]]
    return read.laid_back(torch.cat(outs, dim=1))


def _continued(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spans: list[Span], before: Sequence[Sequence[Span]]
) -> Tensor:
    """(b, t, h, e): each segment of the row after the stretches of the row that stand before it in its document, causally."""
    name = type(call.module).__name__
    if not call.causal or call.options.get("position_bias") is not None or spans[-1][1] != key.shape[2]:
        raise AdapterError(
            f"a shared prefix is for causal attention without relative biases, which {name} is not", "set engine.share_prefix: off"
        )
    window = None if mask is None else call.options.get("sliding_window")
    if mask is not None and window is None:
        raise AdapterError(f"{name} does not say how far it sees, so a shared prefix cannot be masked for it")
    stretches = [(*heads, own) for heads, own in zip(before, spans, strict=True)]
    lengths = [b - a for a, b in spans]
    keys, values = _joined(key, stretches), _joined(value, stretches)
    if mask is None and call.bare and varlen.suits(query, key, value, dropout=call.options.get("dropout") or 0.0):
        counts = [k.shape[2] for k in keys]
        k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        at_once = varlen.attended(query, k, v, lengths, counts, scale=call.scale(query), causal=True)
        if at_once is not None:
            return at_once
    outs = []
    for q, k, v in zip(query.split(lengths, dim=2), keys, values, strict=True):
        t, u = q.shape[2], k.shape[2]
        seen = None
        if window is None and not call.eager and 4 * (u - t) <= t:
            # a kernel that is causal by itself costs less than one with a mask; the rows in front are thrown away
            q = F.pad(q, (0, 0, u - t, 0))
        elif window is not None or t > 1:
            seen = torch.ones(t, u, dtype=torch.bool, device=q.device).tril(u - t)
            seen = (seen if window is None else seen.triu(u - t - window + 1))[None, None]
            seen = as_additive(seen, q.dtype) if call.eager else seen
        outs.append(call.plain(q, k, v, seen)[:, -t:])
    return torch.cat(outs, dim=1)


def _joined(kept: Tensor, wanted: Sequence[Sequence[Span]]) -> list[Tensor]:
    """The stretches of the row (along dimension 2) that each document consists of, one after the other.

    The row is split once at all their ends, so that a stretch's gradient is added up in the stretch's own size.
    """
    cuts = sorted({end for stretches in wanted for stretch in stretches for end in stretch})
    place = {cut: number for number, cut in enumerate(cuts)}
    pieces = kept.split([b - a for a, b in pairwise(cuts)], dim=2)
    parts = [[piece for a, b in stretches for piece in pieces[place[a] : place[b]]] for stretches in wanted]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def _spans(starts_q: Any, starts_k: Any, t: int, u: int) -> list[tuple[Span, Span]]:
    """Each document's (begin, end) among the queries and among the keys."""
    queries = _numbers(starts_q)
    keys = queries if starts_k is None or starts_k is starts_q else _numbers(starts_k)
    if queries[-1] != t or keys[-1] != u or len(queries) != len(keys):
        raise AdapterError(
            f"cu_seq_lens end at {queries[-1]} and {keys[-1]}, but there are {t} queries and {u} keys",
            "a packed batch is not used with a cache",
        )
    return list(zip(pairwise(queries), pairwise(keys), strict=True))


def _numbers(starts: Any) -> list[int]:
    # at once: of a tensor on a GPU each single number would have to be waited for
    return starts.tolist() if isinstance(starts, Tensor) else [int(start) for start in starts]
