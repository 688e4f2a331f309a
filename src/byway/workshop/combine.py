"""Combining updates: task arithmetic, TIES, DARE and magnitude pruning on tensors, and what they give for low-rank pairs.

Legend: t_i are tensors of one shape, w_i their weights, δ the density that is kept.
Sources: Ilharco et al., arXiv 2212.04089 (task arithmetic); Yadav et al., arXiv 2306.01708 (TIES); Yu et al., arXiv 2311.03099 (DARE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from byway.errors import ConfigError, listed, nearest

__all__ = ["OPERATORS", "Sign", "combine", "drop_and_rescale", "largest", "low_rank_of", "ties"]

Sign = Literal["total", "frequency"]


def largest(tensor: Tensor, density: float) -> Tensor:
    """The ``int(δ·n)`` entries of largest size; the others zero, nothing rescaled."""
    keep = int(density * tensor.numel())
    flat = tensor.reshape(-1)
    if keep >= flat.numel():
        return tensor
    mask = torch.zeros_like(flat)
    mask[torch.topk(flat.abs(), keep).indices] = 1
    return (flat * mask).reshape(tensor.shape)


def drop_and_rescale(tensor: Tensor, density: float) -> Tensor:
    """DARE: each entry is kept with probability δ and divided by δ."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _summed(tensors: Tensor, weights: Tensor) -> Tensor:
    return (tensors * weights.reshape(-1, *(1,) * (tensors.dim() - 1))).sum(0)


def ties(tensors: Tensor, weights: Tensor, sign: Sign) -> Tensor:
    """Σ w_i t_i over the entries that agree with the elected sign, divided by how many agree.

    sign: ``total`` of the plain sum (zero counts as +), ``frequency`` of the signs.
    """
    total = (tensors.sum(0) >= 0) if sign == "total" else (torch.sign(tensors).sum(0) >= 0)
    elected = torch.where(total, 1.0, -1.0)
    agrees = torch.sign(tensors) == elected
    return _summed(tensors * agrees, weights) / agrees.sum(0).clamp_min(1)


Operator = Callable[[Tensor, Tensor, float, Sign], Tensor]
OPERATORS: Mapping[str, Operator] = {
    "linear": lambda t, w, density, sign: _summed(t, w),
    "magnitude_prune": lambda t, w, density, sign: _summed(torch.stack([largest(x, density) for x in t]), w),
    "ties": lambda t, w, density, sign: ties(torch.stack([largest(x, density) for x in t]), w, sign),
    "dare_linear": lambda t, w, density, sign: _summed(torch.stack([drop_and_rescale(x, density) for x in t]), w),
    "dare_ties": lambda t, w, density, sign: ties(torch.stack([drop_and_rescale(x, density) for x in t]), w, sign),
}
"""Name → (stacked tensors, weights, density, sign) → one tensor."""


def combine(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], *, density: float | None = None, sign: Sign = "total"
) -> Tensor:
    """The operator `kind` on tensors of one shape.

    Raises:
        ConfigError: an unknown operator or sign rule, or a density that is missing or not in [0, 1].
    """
    if kind not in OPERATORS:
        raise ConfigError(f"there is no combination {kind!r} (there are: {listed(OPERATORS)})", nearest(kind, OPERATORS))
    if sign not in ("total", "frequency"):
        raise ConfigError(f"the sign rule is {sign!r}; it must be total or frequency")
    if kind != "linear" and (density is None or not 0 <= density <= 1):
        raise ConfigError(f"{kind} needs a density from 0 to 1; it is {density!r}")
    stacked = torch.stack(list(tensors))
    scale = torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device)
    return OPERATORS[kind](stacked, scale, 1.0 if density is None else density, sign)


def low_rank_of(
    delta: Tensor, rank: int, *, clamp: float | None = None, full_matrices: bool = True, driver: str | None = None
) -> tuple[Tensor, Tensor]:
    """(A, B) of the best rank-r approximation of an update (out, in): B = U_r S_r, A = V_rᵀ; beyond the quantile `clamp` cut."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    k = min(rank, s.shape[0])
    b, a = u[:, :k] * s[:k], vh[:k]
    if clamp is not None:
        bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp))
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    missing = rank - a.shape[0]
    if missing > 0:  # the weight is narrower than the rank that was asked for
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return a, b


def root(value: float) -> float:
    """√|value|: the share of a weight that falls to each of two factors."""
    return math.sqrt(abs(value))
