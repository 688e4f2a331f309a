"""Combine updates: task arithmetic, TIES, DARE and magnitude pruning on tensors, and low-rank factors of the result.

Legend: t_i are tensors of one shape, w_i their weights, δ the density (the share of entries kept).
Sources: Ilharco et al., arXiv 2212.04089 (task arithmetic); Yadav et al., arXiv 2306.01708 (TIES); Yu et al., arXiv
    2311.03099 (DARE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from byway.errors import ConfigError, listed, nearest

__all__ = ["OPERATORS", "Sign", "combine", "low_rank_of"]

Sign = Literal["total", "frequency"]


def _pruned(tensors: Tensor, density: float) -> Tensor:
    """Keep the ``int(δ·n)`` entries of largest magnitude of each tensor; set the others to zero, without rescaling."""
    keep = int(density * tensors[0].numel())
    flat = tensors.flatten(1)
    if keep >= flat.shape[1]:
        return tensors
    mask = torch.zeros_like(flat)
    for row, entries in zip(mask, flat, strict=True):
        row[torch.topk(entries.abs(), keep).indices] = 1
    return (flat * mask).reshape(tensors.shape)


def _dropped(tensors: Tensor, density: float) -> Tensor:
    """DARE: keep each entry with probability δ and divide it by δ."""
    return torch.stack([t * torch.bernoulli(torch.full_like(t, density)) / density for t in tensors])


def _sum(tensors: Tensor, weights: Tensor) -> Tensor:
    """Σ w_i t_i."""
    return (tensors * weights.reshape(-1, *(1,) * (tensors.dim() - 1))).sum(0)


def _ties(tensors: Tensor, weights: Tensor, sign: Sign) -> Tensor:
    """Σ w_i t_i over the entries that agree with the elected sign, divided by the number of entries that agree.

    sign: the elected sign is that of the plain sum (``total``; zero counts as +) or of the sum of signs
        (``frequency``).
    """
    total = (tensors.sum(0) >= 0) if sign == "total" else (torch.sign(tensors).sum(0) >= 0)
    agrees = torch.sign(tensors) == torch.where(total, 1.0, -1.0)
    return _sum(tensors * agrees, weights) / agrees.sum(0).clamp_min(1)


OPERATORS: Mapping[str, Callable[[Tensor, Tensor, float, Sign], Tensor]] = {
    "linear": lambda t, w, density, sign: _sum(t, w),
    "magnitude_prune": lambda t, w, density, sign: _sum(_pruned(t, density), w),
    "ties": lambda t, w, density, sign: _ties(_pruned(t, density), w, sign),
    "dare_linear": lambda t, w, density, sign: _sum(_dropped(t, density), w),
    "dare_ties": lambda t, w, density, sign: _ties(_dropped(t, density), w, sign),
}
"""Name → function (stacked tensors, weights, density, sign) → combined tensor."""


def combine(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], *, density: float | None = None, sign: Sign = "total"
) -> Tensor:
    """Apply the operator `kind` to tensors of one shape.

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
    """Return (A, B) of the best rank-r approximation of an update (out, in): B = U_r S_r, A = V_rᵀ.

    clamp: limit all entries to ± this quantile of theirs.
    """
    u, s, vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    k = min(rank, s.shape[0])
    b, a = u[:, :k] * s[:k], vh[:k]
    if clamp is not None:
        bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp))
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    missing = rank - a.shape[0]
    if missing > 0:  # the weight is narrower than the requested rank
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return a, b
