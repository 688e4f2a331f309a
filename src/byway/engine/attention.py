"""The model's attention function, ours: the second seam. Prefixes and packed documents live here, and no cache is ever touched.

``byway_sdpa`` and ``byway_eager`` are registered with transformers beside its own functions, each with a mask function (a name without one
gets no mask at all). They do what the function they are named after does, and two things more:

* side paths with :meth:`~byway.slots.SidePath.attend` rewrite keys, values, mask and position bias;
* a batch of packed documents (``cu_seq_lens_q``: where each begins, and the total) is attended document by document, so that nothing leaks
  and changing one document leaves all others bit-equal. Restarted positions alone are no contract: transformers recognizes them for some
  models and calls, and leaks for others. Where documents have a head in common that stands in the row once (``prefix_spans``: for each
  segment the stretches of the row before it), a segment's keys are those stretches and its own.

Legend: b batch, h heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byway.engine.recompute import again
from byway.engine.short_documents import attended, suits
from byway.errors import AdapterError
from byway.slots import slot_of

if TYPE_CHECKING:
    from byway.engine.last_layer import Read

__all__ = ["Installed", "check", "install", "packed", "packing", "recorded", "restore"]

_PREFIX = "byway_"
_PLAIN = ("sdpa", "eager")
_TABLE = 4
"""Keys of documents with one query each go into a table that is at most so many times larger than they are."""
_PACKED: ContextVar[bool] = ContextVar("byway_packed_batch", default=False)
_RECORD: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("byway_recorded_attention", default=None)


@dataclass
class Installed:
    """What :func:`install` has to put back."""

    previous: Any
    """A name, or names by sub-configuration."""
    handle: RemovableHandle


def check(model: nn.Module) -> Any:
    """The implementation that `model` uses now: a name, or ``{"": own, sub-configuration: ...}`` where it has parts with their own.

    Raises:
        AdapterError: the model is none of transformers', its attention does not go through transformers' registry, or it is neither
            sdpa nor eager.
    """
    from byway.families import facts

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not facts(model).attention_registry:
        raise AdapterError(f"the attention of {name} does not go through transformers' registry, so nothing can be put into it")
    previous = _renamed(_chosen(model.config), lambda own: own.removeprefix(_PREFIX))
    for own in _names(previous):
        if own not in _PLAIN:
            raise AdapterError(
                f"{name} attends with {own!r}; Byway's attention stands over sdpa and eager", "model.set_attn_implementation('sdpa')"
            )
    return previous


def install(model: nn.Module) -> Installed:
    """Make `model` attend through our function, over the one that it, or each part of it, uses now; refuses what :func:`check` refuses."""
    previous = check(model)
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(_renamed(previous, lambda own: _PREFIX + own))
    return Installed(previous, model.register_forward_pre_hook(_still_ours))


def restore(model: nn.Module, installed: Installed) -> None:
    """Undo :func:`install`; an implementation that the user has chosen since is left alone."""
    installed.handle.remove()
    if isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX):
        model.set_attn_implementation(installed.previous)


def _chosen(config: Any) -> Any:
    """The implementation of a configuration; with sub-configurations a mapping, in the form that ``set_attn_implementation`` takes."""
    parts = {key: vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None}
    return {"": config._attn_implementation} | {key: _chosen(part) for key, part in parts.items()} if parts else config._attn_implementation


def _renamed(chosen: Any, rename: Callable[[str], str]) -> Any:
    """`chosen` with every name renamed; a part that has none (a backbone of another library) is left so."""
    if isinstance(chosen, dict):
        return {key: _renamed(part, rename) for key, part in chosen.items()}
    return None if chosen is None else rename(chosen)


def _names(chosen: Any) -> list[str]:
    if isinstance(chosen, dict):
        return [name for part in chosen.values() for name in _names(part)]
    return [] if chosen is None else [chosen]


def _still_ours(module: nn.Module, args: Any) -> None:
    implementation = str(module.config._attn_implementation)  # pyright: ignore[reportAttributeAccessIssue]
    if not implementation.startswith(_PREFIX):
        raise AdapterError(
            f"set_attn_implementation({implementation!r}) was called after attach: what Byway put into the attention would be dropped",
            "set the implementation before attaching (byway stands over sdpa and eager)",
        )


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Within this context `model` attends through our function, so that packed batches can be passed to it."""
    from byway.engine.unpack import boundaries

    if isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX):
        with boundaries(model):
            yield
        return
    installed = install(model)
    try:
        with boundaries(model):
            yield
    finally:
        restore(model, installed)


@contextmanager
def packed() -> Iterator[None]:
    """Around one forward of a packed batch: no (t, u) mask over the whole pack is built, each document brings its own."""
    token = _PACKED.set(True)
    try:
        yield
    finally:
        _PACKED.reset(token)


@contextmanager
def recorded() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within this context our attention function notes the keys and values (b, g, u, e) that it is given, by ``id(module)``."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


def _attention_over(plain: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Our function over transformers' `plain` one; called as ``(module, query, key, value, mask, **options)``."""

    def attention(
        module: nn.Module,
        query: Tensor,  # (b, h, t, e)
        key: Tensor,  # (b, g, u, e)
        value: Tensor,  # (b, g, u, e)
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling() and (record := _RECORD.get()) is not None:
            record[id(module)] = (key, value)
        starts_q, starts_k = options.pop("cu_seq_lens_q", None), options.pop("cu_seq_lens_k", None)
        before, read = options.pop("prefix_spans", None), options.pop("queries_read", None)
        for unused in ("max_length_q", "max_length_k"):
            options.pop(unused, None)
        call = ALL_ATTENTION_FUNCTIONS["sdpa"] if plain == "sdpa" else vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        if starts_q is None:
            return _attend(call, module, query, key, value, attention_mask, options)
        spans = _spans(starts_q, starts_k, query.shape[2], key.shape[2])
        if before is not None:
            own_spans = [own for own, _ in spans]
            return _continued(call, module, query, key, value, attention_mask, options, own_spans, before), None
        biased = attention_mask is not None or options.get("position_bias") is not None
        chosen = None if read is None or biased else read.counts([end for (_, end), _ in spans], _causal(module, options))
        if read is not None and chosen is not None:
            return _at_queries(call, module, query, key, value, options, spans, chosen, read), None
        tables = None if biased or plain == "eager" else _in_tables(module, query, key, value, options, spans)
        if tables is not None:
            return tables, None
        outs = []
        # split, not sliced: the gradient of a slice is a tensor of the whole pack's size, mostly zeros
        queries = query.split([b - a for (a, b), _ in spans], dim=2)
        keys, values = (kept.split([d - c for _, (c, d) in spans], dim=2) for kept in (key, value))
        for number, ((a, b), (c, d)) in enumerate(spans):
            own = dict(options)
            if own.get("position_bias") is not None:
                own["position_bias"] = own["position_bias"][:, :, a:b, c:d]
            # a mask that is there (sliding window) depends on distances only, so a document's part of it is the document's own
            mask = None if attention_mask is None else attention_mask[:, :, a:b, c:d]
            if mask is None and plain == "eager" and _causal(module, options) and b - a > 1:
                mask = _additive(torch.ones(b - a, d - c, dtype=torch.bool, device=query.device).tril()[None, None], query.dtype)
            outs.append(_attend(call, module, queries[number], keys[number], values[number], mask, own)[0])
        out = torch.cat(outs, dim=1)  # (b, t, h, e)
        if out.requires_grad and not torch.compiler.is_compiling():
            kept = [each.detach() for each in outs]  # autograd keeps what attention gave
            again(out, lambda: torch.cat(kept, dim=1))
        return out, None

    return attention


def _attend(
    call: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """One plain call, after every active side path of `module` has rewritten keys, values, mask and bias."""
    slot = slot_of(module)
    if slot is None or not slot.attends or slot.silent():
        return call(module, query, key, value, mask, **options)
    additive = mask is not None and mask.dtype != torch.bool
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask is not None and additive else mask
    # what an additive mask says beyond seen or unseen: the relative positions of Swin and BEiT
    offset = mask.masked_fill(~seen, 0) if mask is not None and seen is not None and additive else None
    if seen is None and _causal(module, options) and query.shape[2] > 1:
        t, u = query.shape[2], key.shape[2]
        # as torch's own causal kernel counts, from the first key: a static cache has room behind the last query
        seen = torch.ones(t, u, dtype=torch.bool, device=query.device).tril()[None, None]
    bias = options.pop("position_bias", None)
    for side in slot.attends:
        key, value, seen, bias = side.attend(query, key, value, seen, bias)
    if bias is not None:
        options["position_bias"] = bias
    if seen is None or not (additive or call is not ALL_ATTENTION_FUNCTIONS["sdpa"]):
        return call(module, query, key, value, seen, **options)
    mask = _additive(seen, query.dtype)
    if offset is not None:
        # keys are only ever added in front
        mask = mask + F.pad(offset, (mask.shape[-1] - offset.shape[-1], 0))
    return call(module, query, key, value, mask, **options)


def _in_tables(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    spans: list[tuple[tuple[int, int], tuple[int, int]]],
) -> Tensor | None:
    """(b, t, h, e): the attention of short documents in a few products, as sdpa gives it; None where it is better done one by one."""
    slot = slot_of(module)
    attends = slot is not None and slot.attends and not slot.silent()
    usual = query.shape[0] == 1 and query.shape[:3] == key.shape[:3] and all(own == other for own, other in spans)
    if attends or not usual or not query.requires_grad or torch.compiler.is_compiling() or options.get("softcap") is not None:
        return None  # sdpa itself refuses a softcap
    lengths = [b - a for (a, b), _ in spans]
    # elsewhere nothing was measured
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or not suits(lengths):
        return None
    scale, causal = options.get("scaling"), _causal(module, options)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out = attended(query[0], key[0], value[0], lengths, scale=scale, causal=causal, dropout=options.get("dropout") or 0.0)
    return out.transpose(0, 1)[None]


def _at_queries(
    call: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    spans: list[tuple[tuple[int, int], tuple[int, int]]],
    counts: list[int],
    read: Read,
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
        mask = seen if call is ALL_ATTENTION_FUNCTIONS["sdpa"] else _additive(seen, query.dtype)
        out = _attend(call, module, chosen[0].transpose(0, 1)[:, :, None], k, v, mask, dict(options))[0]  # (n, 1, h, e)
        return read.laid_back(out.transpose(0, 1))
    asked = chosen.split(counts, dim=2)
    keys, values = (kept.split([d - c for _, (c, d) in spans], dim=2) for kept in (key, value))
    outs = [_attend(call, module, q, k, v, None, dict(options))[0] for q, k, v in zip(asked, keys, values, strict=True) if q.shape[2]]
    return read.laid_back(torch.cat(outs, dim=1))


def _continued(
    call: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    spans: list[tuple[int, int]],
    before: Sequence[Sequence[tuple[int, int]]],
) -> Tensor:
    """(b, t, h, e): each segment of the row after the stretches of the row that stand before it in its document, causally."""
    if not _causal(module, options) or options.get("position_bias") is not None or spans[-1][1] != key.shape[2]:
        raise AdapterError(
            f"a shared prefix is for causal attention without relative biases, which {type(module).__name__} is not",
            "set engine.share_prefix: off",
        )
    window = None if mask is None else options.get("sliding_window")
    if mask is not None and window is None:
        raise AdapterError(f"{type(module).__name__} does not say how far it sees, so a shared prefix cannot be masked for it")
    stretches = [(*heads, own) for heads, own in zip(before, spans, strict=True)]
    eager = call is not ALL_ATTENTION_FUNCTIONS["sdpa"]
    outs = []
    for q, k, v in zip(query.split([b - a for a, b in spans], dim=2), _joined(key, stretches), _joined(value, stretches), strict=True):
        t, u = q.shape[2], k.shape[2]
        seen = None
        if window is None and not eager and 4 * (u - t) <= t:
            # a kernel that is causal by itself costs less than one with a mask; the rows in front are thrown away
            q = F.pad(q, (0, 0, u - t, 0))
        elif window is not None or t > 1:
            seen = torch.ones(t, u, dtype=torch.bool, device=q.device).tril(u - t)
            seen = (seen if window is None else seen.triu(u - t - window + 1))[None, None]
            seen = _additive(seen, q.dtype) if eager else seen
        outs.append(_attend(call, module, q, k, v, seen, dict(options))[0][:, -t:])
    return torch.cat(outs, dim=1)


def _joined(kept: Tensor, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
    """The stretches of the row (along dimension 2) that each document consists of, one after the other.

    The row is split once at all their ends, so that a stretch's gradient is added up in the stretch's own size.
    """
    cuts = sorted({end for stretches in wanted for stretch in stretches for end in stretch})
    place = {cut: number for number, cut in enumerate(cuts)}
    pieces = kept.split([b - a for a, b in pairwise(cuts)], dim=2)
    parts = [[piece for a, b in stretches for piece in pieces[place[a] : place[b]]] for stretches in wanted]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def _causal(module: nn.Module, options: dict[str, Any]) -> bool:
    said = options.get("is_causal")
    return bool(vars(module).get("is_causal", True) if said is None else said)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False → 0 / the lowest number, which eager attention adds to its scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _spans(starts_q: Any, starts_k: Any, t: int, u: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Each document's (begin, end) among the queries and among the keys."""
    queries = [int(x) for x in starts_q]
    keys = queries if starts_k is None or starts_k is starts_q else [int(x) for x in starts_k]
    if queries[-1] != t or keys[-1] != u or len(queries) != len(keys):
        raise AdapterError(
            f"cu_seq_lens end at {queries[-1]} and {keys[-1]}, but there are {t} queries and {u} keys",
            "a packed batch is not used with a cache",
        )
    return list(zip(pairwise(queries), pairwise(keys), strict=True))


def _mask_over(plain: str) -> Callable[..., Any]:
    """The mask function of `plain`, which builds none for a packed batch, except where attention is local."""

    def mask(*args: Any, **options: Any) -> Any:
        # dynamo cannot read a ContextVar: compiled, the mask of the whole pack is built, and each document's part of it is its own
        if not torch.compiler.is_compiling() and _PACKED.get() and options.get("local_size") is None:
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[plain](*args, **options)

    return mask


for _name in _PLAIN:
    AttentionInterface.register(_PREFIX + _name, _attention_over(_name))
    AttentionMaskInterface.register(_PREFIX + _name, _mask_over(_name))
