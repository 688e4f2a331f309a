"""Packed documents on a GPU: all of them in one call of torch's variable-length attention.

    O_i = softmax(s·Q_i K_iᵀ) V_i        Q (T, h, e), K, V (U, g, e) with the documents side by side; i: rows starts[i] … starts[i + 1]

One call of sdpa a document is a launch a document and layer, and several more in the backward pass. ``torch.nn.attention.varlen`` takes the
bounds and launches once; its kernels (FlashAttention) are for 16 bits, head sizes up to 256 in multiples of 8, and have no dropout.

A kernel is not taken at its word: before the first call of a kind (device, dtype, heads, head size, causal, more keys than queries) two
small documents are attended by it and by the formula, forward and backward, and where they differ documents are attended one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["attended", "suits"]

_AGREES = 0.02
"""The largest relative difference (norms) from the formula in float32; 16 bits make less than 0.01, a wrong bound about 1."""


class _Kind(NamedTuple):
    """What one proof speaks for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    size: int
    causal: bool
    longer: bool
    """A document has more keys than queries: those in front of it."""


def suits(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> bool:
    """Whether such states (1, h, t, e) can be attended by the kernel at all."""
    size = query.shape[3]
    shapes = query.shape[0] == 1 and key.shape == value.shape and key.shape[3] == size and size % 8 == 0 and size <= 256
    alike = all(each.dtype == query.dtype and each.stride(3) == 1 for each in (query, key, value))
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and shapes and alike and not dropout


def attended(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], *, scale: float, causal: bool
) -> Tensor | None:
    """(1, t, h, e) of (1, h, t, e): what each document's queries see of its keys.

    Args:
        query: documents of `queries` tokens side by side; `key`, `value` (1, g, u, e) of `keys` tokens.
        queries: tokens of each document; `keys`: the same of its keys, of which causal queries are the last.
        scale: of the scores.
        causal: whether a query sees only keys up to its own place.

    Returns: None where the kernel does not give what it should (a warning has said why).
    """
    longer = list(queries) != list(keys)
    kind = _Kind(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], causal, longer)
    if not _proved(kind):
        return None
    return _called(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), queries, keys, scale, causal)[None]


def _called(query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], scale: float, causal: bool) -> Tensor:
    """(t, h, e) of (t, h, e)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        _starts(queries, query.device),
        _starts(keys, query.device),
        max(queries),
        max(keys),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@cache
def _proved(kind: _Kind) -> bool:
    """Whether the kernel gives what the formula gives; said once for each kind."""
    try:
        difference = _difference(kind)
    except (RuntimeError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    else:
        if difference <= _AGREES:
            return True
        reason = f"its answers are {difference:.2g} off"
    warnings.warn(f"torch's variable-length attention is not used, documents are attended one by one: {reason}", stacklevel=2)
    return False


def _difference(kind: _Kind) -> float:
    """The largest relative difference of output and gradients, of two small documents."""
    from torch.nn.attention.varlen import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - set(signature(varlen_attn).parameters)
    if missing:
        raise RuntimeError(f"torch {torch.__version__} does not have its {', '.join(sorted(missing))} yet")
    queries, keys = [3, 18], [7, 25] if kind.longer else [3, 18]
    # on the CPU, so that no generator of the run is moved on
    g = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), kind.heads), (sum(keys), kind.groups), (sum(keys), kind.groups), (sum(queries), kind.heads))
    *states, weights = (torch.randn(*shape, kind.size, generator=g).to(kind.device, kind.dtype) for shape in shapes)
    found: list[list[Tensor]] = []
    with ExitStack() as scopes:
        for scope in (torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind.device.type, enabled=False)):
            scopes.enter_context(scope)
        # whoever counts or replaces what the model saves (checkpointing) must not see this
        scopes.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept))
        for plain in (False, True):
            given = [each.clone().float().requires_grad_() if plain else each.clone().requires_grad_() for each in states]
            q, k, v = given
            scale = 0.7 * kind.size**-0.5  # not the one that a kernel takes by itself
            out = _formula(q, k, v, queries, keys, scale, kind.causal) if plain else _called(q, k, v, queries, keys, scale, kind.causal)
            found.append([out.detach().float(), *torch.autograd.grad(out, given, weights.to(out.dtype))])
    return max(float((own.float() - plain).norm() / plain.norm()) for own, plain in zip(*found, strict=True))


def _formula(query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], scale: float, causal: bool) -> Tensor:
    """The same in plain products, document by document."""
    times = query.shape[1] // key.shape[1]
    outs = []
    for q, k, v in zip(query.split(list(queries)), key.split(list(keys)), value.split(list(keys)), strict=True):
        k, v = (kept.repeat_interleave(times, dim=1) for kept in (k, v))
        scores = scale * torch.einsum("the,uhe->htu", q, k)
        if causal:
            seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
            scores = scores.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("htu,uhe->the", scores.softmax(-1), v))
    return torch.cat(outs)
