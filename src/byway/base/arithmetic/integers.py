"""8-bit numbers: how rows of numbers become whole ones, and how these are multiplied, exactly.

    x' = x·H               H orthogonal (i, i), the same block along the diagonal: Hadamard's matrix of up to 64 numbers, over 8
    q(x) = round(x'/s),    s = max|x'| / 127 of each row
    x·Wᵀ = x'·W'ᵀ ≈ s·t·(q(x)·q(W)ᵀ)

A few channels of a language model's activations are tens of times larger than the rest, in every token; one scale that holds them leaves
the others two or three steps. Turned by H each of 64 numbers holds a share of each of 64, so that none is far larger than the others, and
as H is orthogonal, products stay what they were. Nothing has to be known of the data, and a row's numbers depend on no other row.
SmolLM2-135M, 72 tokens: gradients 11% off instead of 34 (blocks of 8: 18, of 32: 13, of 512: 10).

Source: QuaRot, arXiv 2404.00456 §3 (rotations by Hadamard matrices); here every map turns its own input, and no weight is changed.
Legend: n rows, i in, o out, k numbers of a block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["FEWEST_ROWS", "LEVELS", "STEP", "hadamard", "multiplied", "multiplies_int8", "quantized", "rotated"]

LEVELS = 127
STEP = 8
"""What the sizes of a map must be a multiple of: the integer product of GPUs takes no others."""
FEWEST_ROWS = 17
"""The fewest rows that product takes there; fewer are filled up with zeros."""
_BLOCK = 64
_EXACT = 2**24 // LEVELS**2
"""So many products of two 8-bit numbers add up to less than 2²⁴, up to where every whole number is a float32."""


@cache
def multiplies_int8(kind: str) -> bool:
    """Whether a device of this kind (``cuda``, ``cpu``) has instructions for products of 8-bit numbers.

    GPUs have; processors with AVX512-VNNI, AVX-VNNI or AMX, and ARM's with dot or i8mm.
    """
    if kind != "cpu":
        return True
    report = vars(torch.cpu).get("get_capabilities")  # newer than the oldest torch that is supported
    if report is None:
        return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return any(report().get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dot"))


def hadamard(width: int, device: torch.device) -> Tensor:
    """(k, k), float32: the block that turns rows of `width` numbers; k is the largest power of 2 up to 64 that divides `width`."""
    size = min(width & -width, _BLOCK)
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return (block / size**0.5).to(device)


def rotated(rows: Tensor, block: Tensor) -> Tensor:
    """(n, i) → (n, i): each k numbers of a row times the block; float16, which could not hold the sums, becomes float32."""
    if rows.dtype == torch.float16:
        rows = rows.float()
    return (rows.unflatten(1, (-1, len(block))) @ block.to(rows.dtype)).flatten(1)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, i) → whole numbers (n, i) in int8 and the scale (n, 1) of each row, float32: rows ≈ codes · scale.

    A row that holds an infinity or no number gets a scale that is one too, so that it is seen in what comes out.
    """
    wide = rows.float()
    scale = (wide.abs().amax(1, keepdim=True) if wide.numel() else wide.new_zeros(wide.shape[0], 1)) / LEVELS
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def multiplied(x: Tensor, weight: Tensor, *, native: bool = True) -> Tensor:
    """x·Wᵀ of whole numbers: (n, i), (o, i) → (n, o), int32, exact. `native`: a CPU has instructions for it (:func:`multiplies_int8`)."""
    if x.device.type != "cpu":
        missing = FEWEST_ROWS - x.shape[0]
        filled = torch.nn.functional.pad(x, (0, 0, 0, max(missing, 0)))
        return torch.ops.aten._int_mm(filled, weight.T)[: x.shape[0]]
    return torch.ops.aten._int_mm(x, weight.T) if native else _by_floats(x, weight)


def _by_floats(x: Tensor, weight: Tensor) -> Tensor:
    """The same in float32, as much of a sum at a time as is exact there: far faster where there are no 8-bit instructions."""
    parts = zip(x.split(_EXACT, 1), weight.split(_EXACT, 1), strict=True)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for own, other in parts:
        total += (own.float() @ other.float().T).int()
    return total
