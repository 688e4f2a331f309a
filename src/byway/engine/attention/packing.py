"""Packed batches: documents side by side in one row, without padding, each of which attends to itself only.

A packed batch names the start of each document (``cu_seq_lens_q``). Inside :func:`packing` a model attends document by
document, so that changing one document leaves all others bit-equal. Positions that restart at 0 are not enough:
transformers detects them for some models and calls, and lets documents see each other in the rest.

:func:`attend_documents` takes the first way that fits:

* segments behind shared prefixes: each attends to its prefix spans and itself, on a GPU all in one call;
* one query per document is read (:mod:`byway.engine.last_layer`): one call for all documents, with the keys in a table;
* short documents on a CPU: a few tables (:mod:`byway.engine.attention.tables`);
* a GPU, 16 bits, no dropout: one call of a variable-length kernel (:mod:`byway.engine.attention.varlen`);
* one call per document.

Every call goes through :func:`byway.core.attention.attend` or is made only if no side path acts on the attention.

Shapes: b batch, h query heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.attention import (
    PACKED_PREFIX,
    Call,
    as_additive,
    check,
    implementation_of,
    install,
    is_installed,
    map_names,
    register,
    restore,
)
from byway.engine.attention import tables, varlen
from byway.engine.attention.unpack import boundaries
from byway.engine.backward.recompute import again
from byway.engine.last_layer import PositionsRead
from byway.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attend_documents", "packing"]

_TABLE = 4
"""If one query per document is read: the table of keys may hold this many times as many keys as there are."""

Span = tuple[int, int]
"""(begin, end) in the packed row; end excluded."""


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Let `model` take packed batches within this context.

    Raises:
        AdapterError: its attention is not supported (:func:`byway.core.attention.check`).
    """
    installed = None if is_installed(model) else install(model)
    transformer: PreTrainedModel = model  # pyright: ignore[reportAssignmentType] - `install` has checked it
    before, plain = implementation_of(transformer.config), check(model)
    transformer.set_attn_implementation(map_names(plain, lambda name: PACKED_PREFIX + name))
    try:
        with boundaries(model):
            yield
    finally:
        transformer.set_attn_implementation(before)
        if installed is not None:
            restore(model, installed)


def attend_documents(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    starts: tuple[Any, Any],
    prefixes: Sequence[Sequence[Span]] | None = None,
    read: PositionsRead | None = None,
) -> Tensor:
    """Return the attention output (b, t, h, e) of documents that see only their own keys.

    Args:
        call: sdpa or eager.
        query: (b, h, t, e), documents side by side; `key`, `value` (b, g, u, e).
        mask: the mask of the whole row, if attention is local; each document uses its own part.
        starts: starts of the documents among the queries and, last, the total; the same for the keys (None: as for the
            queries).
        prefixes: for each document (segment) the spans of the row that precede it, as other documents share them; None:
            no sharing.
        read: the queries whose output is read; None: all.
    """
    spans = _spans(*starts, query.shape[2], key.shape[2])
    if prefixes is not None:
        return _behind_prefixes(call, query, key, value, mask, [own for own, _ in spans], prefixes)
    biased = mask is not None or call.options.get("position_bias") is not None
    counts = None if read is None or biased else read.counts([end for (_, end), _ in spans], call.causal)
    if read is not None and counts is not None:
        return _at_queries(call, query, key, value, spans, counts, read)
    if not biased and call.bare:
        at_once = _in_tables(call, query, key, value, spans)
        if at_once is None and len(spans) > 1 and varlen.suits(query, key, value, dropout=call.options.get("dropout") or 0.0):
            lengths, widths = [b - a for (a, b), _ in spans], [d - c for _, (c, d) in spans]
            at_once = varlen.attended(query, key, value, lengths, widths, scale=call.scale(query), causal=call.causal)
        if at_once is not None:
            return at_once
    return _one_by_one(call, query, key, value, mask, spans)


def _one_by_one(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spans: list[tuple[Span, Span]]) -> Tensor:
    outs = []
    window, bias = call.options.get("sliding_window"), call.options.get("position_bias")
    # split, not sliced: the gradient of a slice is a tensor of the whole row's size, mostly zeros
    queries = query.split([b - a for (a, b), _ in spans], dim=2)
    keys, values = (kept.split([d - c for _, (c, d) in spans], dim=2) for kept in (key, value))
    for number, ((a, b), (c, d)) in enumerate(spans):
        own = {} if bias is None else {"position_bias": bias[:, :, a:b, c:d]}
        # the mask of a sliding window depends on distances only; a document shorter than the window needs none
        within = window is not None and d - c < window
        seen = None if mask is None or within else mask[:, :, a:b, c:d]
        if seen is None and call.eager and call.causal and b - a > 1:
            seen = as_additive(torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).tril()[None, None], query.dtype)
        outs.append(call.plain(queries[number], keys[number], values[number], seen, **own))
    out = torch.cat(outs, dim=1)  # (b, t, h, e)
    if out.requires_grad and not torch.compiler.is_compiling():
        kept = [each.detach() for each in outs]  # autograd keeps these anyway: attention saves its output
        again(out, lambda: torch.cat(kept, dim=1))
    return out


def _in_tables(call: Call, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[Span, Span]]) -> Tensor | None:
    """Return the attention of short documents in tables; None if another way is faster or tables do not apply."""
    usual = query.shape[0] == 1 and query.shape[:3] == key.shape[:3] and all(own == other for own, other in spans)
    if not usual or not query.requires_grad:
        return None
    lengths = [b - a for (a, b), _ in spans]
    # measured on CPUs in these dtypes only
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or not tables.suits(lengths):
        return None
    dropout = call.options.get("dropout") or 0.0
    out = tables.attended(query[0], key[0], value[0], lengths, scale=call.scale(query), causal=call.causal, dropout=dropout)
    return out.transpose(0, 1)[None]


def _at_queries(
    call: Call, query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[Span, Span]], counts: list[int], read: PositionsRead
) -> Tensor:
    """Return the attention (b, t, h, e) of the queries that are read, `counts` per document; zeros elsewhere."""
    chosen = query.index_select(2, read.index.to(query.device))
    lengths = [d - c for _, (c, d) in spans]
    if set(counts) == {1} and len(counts) * max(lengths) <= _TABLE * key.shape[2]:
        # one query per document: one call, with the keys of all documents in a table
        places = torch.arange(max(lengths), device=key.device)
        ends = torch.tensor([d for _, (_, d) in spans], device=key.device)
        index = ends[:, None] - torch.tensor(lengths, device=key.device)[:, None] + places  # (n, u)
        seen = (index < ends[:, None])[:, None, None]
        flat = index.clamp(max=key.shape[2] - 1).flatten()
        # (n, g, u, e)
        k, v = (kept[0].index_select(1, flat).unflatten(1, index.shape).transpose(0, 1) for kept in (key, value))
        mask = as_additive(seen, query.dtype) if call.eager else seen
        out = call.plain(chosen[0].transpose(0, 1)[:, :, None], k, v, mask)  # (n, 1, h, e)
        return read.scatter(out.transpose(0, 1))
    queries = chosen.split(counts, dim=2)
    keys, values = (kept.split(lengths, dim=2) for kept in (key, value))
    outs = [call.plain(q, k, v, None) for q, k, v in zip(queries, keys, values, strict=True) if q.shape[2]]
    return read.scatter(torch.cat(outs, dim=1))


def _behind_prefixes(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spans: list[Span], prefixes: Sequence[Sequence[Span]]
) -> Tensor:
    """Return the causal attention (b, t, h, e) of each segment to the prefix spans before it, and to itself."""
    name = type(call.module).__name__
    if not call.causal or call.options.get("position_bias") is not None or spans[-1][1] != key.shape[2]:
        raise AdapterError(
            f"{name} cannot use a shared prefix, which needs causal attention without relative position biases",
            "set engine.share_prefix: off",
        )
    window = None if mask is None else call.options.get("sliding_window")
    if mask is not None and window is None:
        raise AdapterError(f"{name} does not say how far it sees, so a shared prefix cannot be masked", "set engine.share_prefix: off")
    stretches = [(*before, own) for before, own in zip(prefixes, spans, strict=True)]
    lengths = [b - a for a, b in spans]
    keys, values = _gathered(key, stretches), _gathered(value, stretches)
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
            # a causal kernel costs less than one with a mask; the output of the padding in front is thrown away
            q = F.pad(q, (0, 0, u - t, 0))
        elif window is not None or t > 1:
            seen = torch.ones(t, u, dtype=torch.bool, device=q.device).tril(u - t)
            seen = (seen if window is None else seen.triu(u - t - window + 1))[None, None]
            seen = as_additive(seen, q.dtype) if call.eager else seen
        outs.append(call.plain(q, k, v, seen)[:, -t:])
    return torch.cat(outs, dim=1)


def _gathered(states: Tensor, wanted: Sequence[Sequence[Span]]) -> list[Tensor]:
    """Return for each document its spans of the row (dimension 2) side by side.

    It is split once at the ends of all spans, so that gradients add up in tensors of a span's size, not the row's.
    """
    cuts = sorted({end for spans in wanted for span in spans for end in span})
    place = {cut: number for number, cut in enumerate(cuts)}
    pieces = states.split([b - a for a, b in pairwise(cuts)], dim=2)
    parts = [[piece for a, b in spans for piece in pieces[place[a] : place[b]]] for spans in wanted]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def _spans(starts_q: Any, starts_k: Any, t: int, u: int) -> list[tuple[Span, Span]]:
    """Return the span of each document among the queries and among the keys."""

    def numbers(starts: Any) -> list[int]:
        # all at once: reading one number of a GPU tensor waits for the device
        return starts.tolist() if isinstance(starts, Tensor) else [int(start) for start in starts]

    queries = numbers(starts_q)
    keys = queries if starts_k is None or starts_k is starts_q else numbers(starts_k)
    if queries[-1] != t or keys[-1] != u or len(queries) != len(keys):
        raise AdapterError(
            f"cu_seq_lens end at {queries[-1]} and {keys[-1]}, but there are {t} queries and {u} keys",
            "check the bounds of the packed batch, and call the model without a cache",
        )
    return list(zip(pairwise(queries), pairwise(keys), strict=True))


register(PACKED_PREFIX, attend_documents)
