"""Initial values of A and B for one module.

============  ===================================  ============  =====================================================
init          A                                    B             source
============  ===================================  ============  =====================================================
kaiming       U(±1/√in)                            0             loralib and HF peft (embedding: A = 0, B ~ N(0, 1))
gaussian      N(0, 1/r)                            0             HF peft
pissa         √(S_r/s)·V_rᵀ                        U_r·√(S_r/s)  arXiv 2404.02948; ``pissa_fast``: subspace iteration
olora         R[:r] of W = QR                      Q[:, :r]      arXiv 2406.01775
eva           top r principal directions of the    0             arXiv 2410.07170; needs data, see
              inputs                                             :mod:`byway.methods.lowrank.eva`
============  ===================================  ============  =====================================================

W is (out, in) and s the scale. The product BA of PiSSA and OLoRA is not zero. It is kept and subtracted, so that the
base keeps its bytes and attaching does not change the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from byway.core.slots import Site
from byway.core.weights import dense, device_of, factor_dtype, features, is_linear, is_transposed
from byway.errors import TargetError
from byway.methods.lowrank.sides import Factors

__all__ = ["Init", "block_factors", "factors", "matrix_sizes", "subtracted"]

Init = Literal["kaiming", "gaussian", "pissa", "pissa_fast", "olora", "eva"]
_FROM_WEIGHT = ("pissa", "pissa_fast", "olora")


def subtracted(init: Init) -> bool:
    """True if the initial BA is not zero, so that it must be kept and subtracted."""
    return init in _FROM_WEIGHT


def factors(site: Site, rank: int, init: Init, scale: float, generator: torch.Generator) -> Factors:
    """Return the initial A and B, on the site's device; for ``eva`` those of ``kaiming``, until the data gives its
    A."""
    if subtracted(init):
        return _from_weight(site, rank, scale, init, generator)
    return _drawn(site.module, rank, init, generator)


def matrix_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of the weight as a matrix; the rank of an update cannot exceed the smaller of the two."""
    inside, outside = features(module)
    return (inside * math.prod(module.kernel_size), outside) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else (inside, outside)


def _drawn(module: nn.Module, rank: int, init: Init, generator: torch.Generator) -> Factors:
    """Draw A from U(±1/√fan_in) or N(0, 1/r) and set B = 0; for an embedding, A = 0 and B from N(0, 1)."""
    dtype, device = factor_dtype(module), device_of(module)
    inside, outside = features(module)
    if isinstance(module, nn.Embedding):
        normal = torch.randn(outside, rank, dtype=dtype, generator=generator)
        return torch.zeros(rank, inside, dtype=dtype, device=device), normal.to(device)
    kernel: tuple[int, ...] = ()
    groups = 1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel, groups = tuple(module.kernel_size), module.groups
    a = torch.empty(rank, inside, *kernel, dtype=dtype)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
    else:
        bound = 1.0 / math.sqrt(inside * math.prod(kernel))
        a.uniform_(-bound, bound, generator=generator)
    b = torch.zeros(outside, rank // groups, *(1,) * len(kernel), dtype=dtype, device=device)
    return a.to(device), b


def block_factors(site: Site, rank: int, blocks: Sequence[bool], generator: torch.Generator) -> Factors:
    """Return A (r·k, in), drawn as ``kaiming``, and B (k·out/n, r), zero, for k enabled of n blocks of a fused map."""
    module = site.module
    if not is_linear(module):
        raise TargetError(f"{site.path} is a {type(module).__name__}; only fused linear maps have blocks")
    inside, outside = features(module)
    if outside % len(blocks):
        raise TargetError(
            f"{site.path} has {outside} outputs, which {len(blocks)} blocks do not divide evenly", "blocks needs one flag per fused map"
        )
    enabled = sum(blocks)
    dtype, device = factor_dtype(module), device_of(module)
    bound = 1.0 / math.sqrt(inside)
    a = torch.empty(rank * enabled, inside, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return a.to(device), torch.zeros(outside // len(blocks) * enabled, rank, dtype=dtype, device=device)


def _from_weight(site: Site, rank: int, scale: float, init: Init, generator: torch.Generator) -> Factors:
    """Compute A and B from W.

    PiSSA: with W = U S Vᵀ, s·BA is the part of W along its r largest singular values.
    OLoRA: with W = QR, BA = Q[:, :r]·R[:r]; the columns of B are orthonormal.
    """
    module = site.module
    if not is_linear(module):
        name = "OLoRA" if init == "olora" else "PiSSA"
        raise TargetError(
            f"{site.path} is a {type(module).__name__}; {name} initializes linear maps only", "exclude it, or choose init: kaiming"
        )
    kept = factor_dtype(module)
    weight = dense(module).to(torch.promote_types(kept, torch.float32))
    weight = weight.T if is_transposed(module) else weight  # (out, in)
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:rank].contiguous().to(kept), q[:, :rank].contiguous().to(kept)
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = _randomized_svd(weight, rank, generator)
    root = torch.sqrt(s[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _randomized_svd(weight: Tensor, rank: int, generator: torch.Generator, rounds: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top singular triplets by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4).

    The subspace is twice as wide as the rank.
    """
    width = min(2 * rank, *weight.shape)
    basis = torch.randn(weight.shape[1], width, dtype=weight.dtype, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ basis).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vh
