"""Low-rank side paths: y = f(x) + s·B(A(drop(x))), one class for each kind of module.

Notation: A is ``lora_A``, B is ``lora_B``, r the rank, s the scale (alpha/r, or alpha/√r if rank-stabilized). ΔW is the
update that :meth:`fold` adds, in the module's own layout. Factors are float32 (float64 on a float64 base) whatever the
dtype of the base. The product is computed in the input's dtype, as under automatic mixed precision.

Source: LoRA, arXiv 2106.09685 §4.1. Convolutions and embeddings follow HF peft.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.folding import Scratch, row_blocks
from byway.core.slots import ModuleRef, RowFold, SidePath, first, first_to_see
from byway.core.weights import device_of, features, gives_a_new_tensor, is_embedding, is_transposed
from byway.engine.backward.recompute import dropped
from byway.errors import NotMergeable

__all__ = ["BlockLoRA", "ConvLoRA", "EmbeddingLoRA", "Factors", "LinearLoRA", "LowRank", "as_rows", "divisor", "like_weight"]

Factors = tuple[Tensor, Tensor]
"""A and B."""


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight as a matrix with one row per output feature.

    (out, in) of a linear map, (out, in·k…) of a convolution, (width, entries) of an embedding.
    """
    return weight.T if is_transposed(module) or is_embedding(module) else weight.flatten(1)


def like_weight(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """Invert :func:`as_rows`: return `rows` in the module's own layout and `shape`."""
    return rows.T if is_transposed(module) or is_embedding(module) else rows.reshape(shape)


def divisor(rank: int, rank_stabilized: bool) -> float:
    """Return alpha/s: the rank, or its square root if rank-stabilized."""
    return math.sqrt(rank) if rank_stabilized else float(rank)


class LowRank(SidePath):
    """Two factors, a scale, and dropout on the input of the branch.

    `start`: initial factors A₀, B₀ whose product is not zero (PiSSA, OLoRA). The side path adds s·(BA − B₀A₀), so the
    base keeps its bytes.
    """

    peft_names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}  # noqa: RUF012 - a constant

    def __init__(
        self,
        module: nn.Module,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        start: Factors | None = None,
    ) -> None:
        super().__init__()
        self.base = ModuleRef(module)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.lora_bias = nn.Parameter(torch.zeros(b.shape[0], dtype=b.dtype, device=b.device)) if bias else None
        self.rank_stabilized = rank_stabilized
        self.scale = alpha / divisor(self.rank, rank_stabilized)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None if start is None else start[0])
        self.register_buffer("start_B", None if start is None else start[1])

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]

    @property
    def exported_rank(self) -> int:
        """Rank of the plain LoRA that :meth:`export` writes: 2r if initial factors are subtracted."""
        return self.rank if self.start_A is None else 2 * self.rank

    @property
    def exported_alpha(self) -> float:
        """Alpha that gives the same scale at the exported rank."""
        return self.scale * divisor(self.exported_rank, self.rank_stabilized)

    def product(self) -> Tensor:
        """Return s·(BA − B₀A₀) as a 2-D matrix."""
        delta = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        if self.start_A is not None and self.start_B is not None:
            delta = delta - self.start_B.flatten(1) @ self.start_A.flatten(1)
        return self.scale * delta.detach()

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return s·B(A(x)) for one pair of factors, which have the dtype of x."""
        raise TypeError(f"{type(self).__name__} has no branch")

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x = first(inputs)
        if self.dropout is not None:
            x = dropped(self.dropout, x)
        return self.add(out, x)

    def update(self, x: Tensor) -> Tensor:
        """Return s·(BA − B₀A₀)x."""
        dtype = x.dtype if x.is_floating_point() else self.lora_A.dtype  # token ids are integers
        delta = self.branch(x, self.lora_A.to(dtype), self.lora_B.to(dtype))
        if self.start_A is None or self.start_B is None:
            return self.with_bias(delta)
        # subtract the branches before adding: the difference is exactly 0 before training
        return self.with_bias(delta - self.branch(x, self.start_A.to(dtype), self.start_B.to(dtype)))

    def with_bias(self, delta: Tensor) -> Tensor:
        """Return `delta` plus the branch's scaled bias, if it has one."""
        return delta if self.lora_bias is None else delta + self.scale * self.lora_bias.to(delta.dtype)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Return out + s·(BA − B₀A₀)x."""
        return out + self.update(x).to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        delta = like_weight(self.base.module, self.product(), weight.shape)
        return tensors | {"weight": weight + delta.to(weight.dtype)} | self.fold_bias(tensors)

    def fold_bias(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"bias": ...}`` with the branch's bias merged in; ``{}`` if the branch has none."""
        if self.lora_bias is None:
            return {}
        if "bias" not in tensors:
            raise NotMergeable(
                "the branch has a bias (lora_bias), but the module has none that it could be folded into", "keep it as an adapter"
            )
        return {"bias": tensors["bias"] + self.scale * self.lora_bias.detach().to(tensors["bias"].dtype)}

    def destinations(self) -> dict[str, Tensor]:
        """Return A, B and the bias only: a file whose initial factors are recomputed (peft's PiSSA) has no others."""
        return super().export()

    def export(self) -> dict[str, Tensor]:
        """Return plain LoRA factors: of rank 2r, ``[A; A₀]`` and ``[B, −B₀]``, if initial factors are subtracted."""
        out = self.destinations()
        if self.start_A is not None and self.start_B is not None:
            names = self.peft_names
            out[names["lora_A"]] = torch.cat([self.lora_A.detach(), self.start_A])
            out[names["lora_B"]] = torch.cat([self.lora_B.detach(), -self.start_B], dim=1)
        return out


class LinearLoRA(LowRank):
    """y = Wx + b + s·B(A(drop(x))); A (r, in), B (out, r), ΔW = s·BA (transposed if the module stores (in, out))."""

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(module, a, b, **options)
        self.transposed = is_transposed(module)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a) * self.scale  # (..., r)
        return F.linear(hidden, b)  # (..., out)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        whole = self._writable(out, x)
        if whole is None:
            return super().add(out, x)
        return AddLowRank.apply(whole, x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), self.scale).view(out.shape)

    def _writable(self, out: Tensor, x: Tensor) -> Tensor | None:
        """Return the tensor behind `out` if the sum may be written into it, else None.

        An in-place write rewires the autograd graph. Code that saw `out` before (a hook, or a custom autograd function
        that returned a view) would no longer get its gradient. So the map must be a plain product whose output no other
        hook or side path has seen.
        """
        plain = self.lora_bias is None and self.start_A is None
        # a compiler fuses the sum anyway, and torch.func's transforms need plain operations
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not plain or transformed or x.dim() < 2 or out.dtype != x.dtype:
            return None
        module = self.base.module
        if not (gives_a_new_tensor(module) and first_to_see(module, self)):
            return None
        whole = out._base if out._is_view() else out  # a map with a bias returns a view of its product
        fits = whole is not None and whole.numel() == out.numel() and whole.is_contiguous() and out.is_contiguous()
        return whole if fits else None

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        out, scratch = weight.clone(), Scratch()
        for rows in row_blocks(weight):
            self._add_rows(out[rows], rows, scratch.like(out[rows]))
        return tensors | {"weight": out} | self.fold_bias(tensors)

    def row_fold(self) -> RowFold | None:
        # a subclass that folds differently must not use this one's row fold
        own = type(self)
        by_rows = self.lora_bias is None and own.fold is LinearLoRA.fold and own.product is LowRank.product
        return RowFold(self._add_rows, self._bound) if by_rows else None

    def _add_rows(self, weight: Tensor, rows: slice, spare: Tensor) -> None:
        # round s·BA first and then the sum, as when s·BA is formed whole and added
        delta = self._rows_of(self.lora_B, self.lora_A, rows, spare)
        if self.start_A is not None and self.start_B is not None:
            delta.sub_(self._rows_of(self.start_B, self.start_A, rows, torch.empty_like(spare)))
        weight.add_(delta.mul_(self.scale))

    def _bound(self) -> float:
        # Cauchy-Schwarz: the largest row of B times the largest column of A
        pairs: list[Factors] = [(self.lora_B, self.lora_A)]
        if self.start_A is not None and self.start_B is not None:
            pairs.append((self.start_B, self.start_A))
        return abs(self.scale) * sum(float(b.detach().norm(dim=1).max() * a.detach().norm(dim=0).max()) for b, a in pairs)

    def _rows_of(self, b: Tensor, a: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Write these rows of BA, in the module's layout, into `out`."""
        b, a = b.detach().to(out.dtype), a.detach().to(out.dtype)
        return torch.mm(a[:, rows].T, b.T, out=out) if self.transposed else torch.mm(b[rows], a, out=out)


class EmbeddingLoRA(LowRank):
    """y = E[i] + s·B·A[:, i]; A (r, entries), B (width, r), ΔE = s·(BA)ᵀ. No dropout, as in loralib."""

    peft_names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "lora_bias": "lora_embedding_B.bias"}  # noqa: RUF012

    def __init__(self, module: nn.Embedding, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(module, a, b, **{**options, "dropout": 0.0})
        self.padding_idx = module.padding_idx

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.embedding(x, a.T, padding_idx=self.padding_idx) * self.scale  # (..., r)
        return F.linear(hidden, b)


class ConvLoRA(LowRank):
    """y = conv(x) + s·B∗(A∗drop(x)); A (r, in, k…) with the base's stride, padding and dilation, B (out, r/groups, 1…).

    ΔW[o, i, u, v] = s·Σ_ρ B[o, ρ]·A[ρ, i, u, v]. With groups > 1 the branch mixes all input channels, so it cannot be
    folded into the grouped weight.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(module, a, b, **options)
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
        self.spatial = len(module.kernel_size)
        self.stride, self.dilation, self.groups = module.stride, module.dilation, module.groups
        self.padding = module.padding if module.padding_mode == "zeros" else 0
        self.padding_mode = module.padding_mode
        self.pad_by = [] if module.padding_mode == "zeros" else list(module._reversed_padding_repeated_twice)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.pad_by:
            x = F.pad(x, self.pad_by, mode=self.padding_mode)
        hidden = self.convolve(x, a, None, self.stride, self.padding, self.dilation, 1) * self.scale
        return self.convolve(hidden, b, None, 1, 0, 1, self.groups)

    def with_bias(self, delta: Tensor) -> Tensor:
        if self.lora_bias is None:
            return delta
        return delta + self.scale * self.lora_bias.to(delta.dtype).reshape(-1, *(1,) * self.spatial)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.groups > 1:
            raise NotMergeable(f"the weight of a convolution with {self.groups} groups cannot hold this low-rank update")
        return super().fold(tensors)


class AddLowRank(torch.autograd.Function):
    """y ← y + s·B(A(x)), in place: neither the branch's output nor a second y is allocated.

    y (..., out), x (..., in), A (r, in), B (out, r). Saved for backward: x, A(x) and the factors.
    ∂x = s·(∂y B)A, ∂A = s·(∂y B)ᵀx, ∂B = s·∂yᵀA(x); ∂y passes through unchanged.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        hidden = F.linear(x, a).flatten(0, -2) * scale  # (n, r)
        out.view(-1, out.shape[-1]).addmm_(hidden, b.T)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        x, hidden, a, b = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)  # (n, out)
        if torch.is_grad_enabled():  # double backward: A(x) must be a function of x and A
            hidden = F.linear(x, a).flatten(0, -2) * ctx.scale
        _, of_x, of_a, of_b, _ = ctx.needs_input_grad
        dh = (dy @ b) * ctx.scale if of_x or of_a else None  # (n, r)
        dx = (dh @ a).view(x.shape) if of_x and dh is not None else None
        da = dh.T @ x.flatten(0, -2) if of_a and dh is not None else None
        return gradients[0], dx, da, dy.T @ hidden if of_b else None, None


class BlockLoRA(LinearLoRA):
    """LoRA on a fused map (QKV): each enabled one of n equal output blocks has its own rank-r pair, the others none.

    A (r·k, in) for k enabled blocks, B (k·out/n, r); ΔW = s·B_jA_j in block j, exactly zero in disabled blocks.
    Exported as a plain LoRA of rank r·k with a block-diagonal B. Source: loralib, MergedLinear.
    """

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, *, blocks: tuple[bool, ...], **options: Any) -> None:
        super().__init__(module, a, b, **options)
        self.blocks = blocks
        self.enabled = sum(blocks)
        width = features(module)[1] // len(blocks)
        rows = torch.cat([torch.arange(j * width, (j + 1) * width) for j, on in enumerate(blocks) if on])
        self.rows: Tensor
        self.register_buffer("rows", rows.to(device_of(module)), persistent=False)
        self.out = width * len(blocks)

    @property
    def rank(self) -> int:
        return self.lora_B.shape[1]

    @property
    def exported_rank(self) -> int:
        return self.rank * self.enabled

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a) * self.scale  # (..., k·r)
        hidden = hidden.unflatten(-1, (self.enabled, self.rank))  # (..., k, r)
        # (..., k·out/n)
        wide = torch.einsum("...kr,kor->...ko", hidden, b.unflatten(0, (self.enabled, -1))).flatten(-2)
        return wide.new_zeros(*wide.shape[:-1], self.out).index_copy(-1, self.rows, wide)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        return LowRank.add(self, out, x)

    def product(self) -> Tensor:
        return self.scale * self.spread() @ self.lora_A.detach()

    def spread(self) -> Tensor:
        """Return B as one matrix (out, k·r): block-diagonal, zero in the rows of disabled blocks."""
        blocks = torch.block_diag(*self.lora_B.detach().unflatten(0, (self.enabled, -1)))
        return blocks.new_zeros(self.out, blocks.shape[1]).index_copy(0, self.rows, blocks)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return LowRank.fold(self, tensors)

    def export(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.spread()}
