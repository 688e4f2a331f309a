"""Fixed draws: two ways to compute one thing in training mode can be compared although dropout and jitter draw numbers.

Packing, prefix sharing and a last layer on fewer tokens change how many numbers are drawn and for which token. Within
:class:`FixedDraws` what is drawn depends on the feature alone (the index in the last dimension), so that a token gets
the same values wherever it stands. Attention probabilities, whose last dimension is a token, are not dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["FixedDraws"]

_Rule = Callable[..., Any]


class FixedDraws(TorchFunctionMode):
    """Within this context dropout and torch's random numbers are fixed, in this thread."""

    def __torch_function__(
        self, func: _Rule, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(func, *args, **(kwargs or {}))


def _uniform(like: Tensor) -> Tensor:
    """Return numbers between 0 and 1, one for each feature of `like`; 1 for a single number (is a layer skipped?)."""
    if not like.dim():
        return torch.ones_like(like)
    width = like.shape[-1]
    row = torch.rand(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return row.to(like.device, like.dtype).expand(like.shape)


def _dropout(func: _Rule, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or input.dim() > 3:
        return func(input, p if p == 1 else 0.0, training, inplace)
    mask = (_uniform(input) >= p).to(input.dtype) / (1 - p)
    return input.mul_(mask) if inplace else input * mask


def _plain_dropout(func: _Rule, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(lambda x, p, train, _: func(x, p, train), input, p, train)


def _whole_channels(func: _Rule, input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _attention(
    func: _Rule, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any
) -> Tensor:
    return func(query, key, value, attn_mask=attn_mask, **more)


def _filled(func: _Rule, input: Tensor, *numbers: Any, **more: Any) -> Tensor:
    """In-place draws, ``uniform_(low, high)`` and ``normal_(mean, deviation)``: the same range and scale."""
    if func is Tensor.uniform_:
        low, high = (*numbers, *(0.0, 1.0)[len(numbers) :]) if numbers else (more.get("from", 0.0), more.get("to", 1.0))
        return input.copy_(_uniform(input) * (high - low) + low)
    mean, deviation = (*numbers, *(0.0, 1.0)[len(numbers) :]) if numbers else (more.get("mean", 0.0), more.get("std", 1.0))
    return input.copy_((_uniform(input) - 0.5) * (12**0.5 * deviation) + mean)


def _chosen(func: _Rule, input: Tensor, p: float | Tensor | None = None, **more: Any) -> Tensor:
    """Zeros and ones: with the probabilities `input`, or, in place, one probability `p` for all."""
    if func is Tensor.bernoulli_:
        return input.copy_(_uniform(input) < (0.5 if p is None else p))
    return (_uniform(input) < input).to(input.dtype)


def _waited(func: _Rule, input: Tensor, lambd: float = 1.0, **more: Any) -> Tensor:
    return input.copy_(-torch.log1p(-_uniform(input).clamp(max=0.999)) / lambd)


def _drawn(func: _Rule, *args: Any, **more: Any) -> Tensor:
    out = func(*args, **more)
    normal = func in (torch.randn, torch.randn_like)
    return out.detach().copy_((_uniform(out) - 0.5) * 12**0.5 if normal else _uniform(out)).requires_grad_(out.requires_grad)


_RULES: Mapping[_Rule, _Rule] = {
    functional.dropout: _dropout,
    torch.dropout: _plain_dropout,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys((functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout), _whole_channels),
    **dict.fromkeys((Tensor.uniform_, Tensor.normal_), _filled),
    **dict.fromkeys((torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_), _chosen),
    Tensor.exponential_: _waited,
    **dict.fromkeys((torch.rand, torch.randn, torch.rand_like, torch.randn_like), _drawn),
}
