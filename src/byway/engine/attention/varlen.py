"""Packed documents on a GPU: all of them in one call of torch's variable-length attention.

    O_i = softmax(s·Q_i K_iᵀ) V_i        i: rows starts[i] … starts[i + 1]

with Q (T, h, e), K, V (U, g, e), documents side by side. One sdpa call per document is one kernel launch per document
and layer, and several more in the backward pass. ``torch.nn.attention.varlen`` takes the bounds of the documents and
launches once. Its kernels (FlashAttention) take 16 bits, head sizes up to 256 in multiples of 8, and no dropout.

The kernel is verified before it is used. Before the first call of a kind (device, dtype, heads, head size, causal, more
keys than queries) two small documents go through it and through the formula, forward and backward. If they differ, a
warning says so and documents are attended one by one.
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
"""Largest relative difference from the formula in float32: rounding to 16 bits causes < 0.01, a wrong bound about 1."""


class _Kind(NamedTuple):
    """The calls that one verification covers."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    size: int
    causal: bool
    longer: bool
    """True if documents have more keys than queries, as behind a shared prefix."""


def suits(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> bool:
    """True if the kernel supports these states (1, h, t, e)."""
    size = query.shape[3]
    shapes = query.shape[0] == 1 and key.shape == value.shape and key.shape[3] == size and size % 8 == 0 and size <= 256
    alike = all(each.dtype == query.dtype and each.stride(3) == 1 for each in (query, key, value))
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and shapes and alike and not dropout


def attended(
    query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], *, scale: float, causal: bool
) -> Tensor | None:
    """Return the attention output (1, t, h, e) of packed documents; None if the kernel failed its verification.

    Args:
        query: (1, h, t, e), documents of `queries` tokens side by side; `key`, `value` (1, g, u, e), of `keys` tokens.
        queries: queries of each document; `keys`: keys of each document. Causal queries are aligned with the last keys.
        scale: factor of the scores.
        causal: True if a query sees only the keys up to its own position.
    """
    longer = list(queries) != list(keys)
    kind = _Kind(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], causal, longer)
    if not _verified(kind):
        return None
    return _called(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), queries, keys, scale, causal)[None]


def _called(query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], scale: float, causal: bool) -> Tensor:
    """Call the kernel on (t, h, e); returns (t, h, e)."""
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
    assert isinstance(out, Tensor)  # a tuple only if weights are asked for
    return out


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@cache
def _verified(kind: _Kind) -> bool:
    """True if the kernel agrees with the formula; warns once per kind if it does not."""
    try:
        difference = _difference(kind)
    except (RuntimeError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    else:
        if difference <= _AGREES:
            return True
        reason = f"its results are off by {difference:.2g}"
    warnings.warn(f"torch's variable-length attention is not used and documents are attended one by one: {reason}", stacklevel=2)
    return False


def _difference(kind: _Kind) -> float:
    """Return the largest relative difference of output and gradients from the formula, for two small documents."""
    from torch.nn.attention.varlen import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - set(signature(varlen_attn).parameters)
    if missing:
        raise RuntimeError(f"in torch {torch.__version__} it does not take {', '.join(sorted(missing))}")
    queries, keys = [3, 18], [7, 25] if kind.longer else [3, 18]
    # drawn on the CPU by a generator of its own, so that the run's random state is untouched
    g = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), kind.heads), (sum(keys), kind.groups), (sum(keys), kind.groups), (sum(queries), kind.heads))
    *states, weights = (torch.randn(*shape, kind.size, generator=g).to(kind.device, kind.dtype) for shape in shapes)
    found: list[list[Tensor]] = []
    with ExitStack() as scopes:
        for scope in (torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind.device.type, enabled=False)):
            scopes.enter_context(scope)
        # hooks that count or replace the model's saved tensors (checkpointing) must not see this computation
        scopes.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept))
        for plain in (False, True):
            given = [each.clone().float().requires_grad_() if plain else each.clone().requires_grad_() for each in states]
            q, k, v = given
            scale = 0.7 * kind.size**-0.5  # not the kernel's default
            out = _formula(q, k, v, queries, keys, scale, kind.causal) if plain else _called(q, k, v, queries, keys, scale, kind.causal)
            found.append([out.detach().float(), *torch.autograd.grad(out, given, weights.to(out.dtype))])
    return max(float((own.float() - plain).norm() / plain.norm()) for own, plain in zip(*found, strict=True))


def _formula(query: Tensor, key: Tensor, value: Tensor, queries: Sequence[int], keys: Sequence[int], scale: float, causal: bool) -> Tensor:
    """Compute the same by plain products, document by document."""
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
