"""Low-rank side paths: y = f(x) + s·B(A(drop(x))), one class for each kind of module.

Legend: A is ``lora_A``, B is ``lora_B``, r the rank, s the scale (alpha/r, or alpha/√r when rank-stabilized). ΔW is what :meth:`fold` adds,
in the module's own layout. Factors are float32 (float64 on a float64 base) whatever the base is; the product is computed in the input's
dtype, as automatic mixed precision would. Source: LoRA, arXiv 2106.09685 §4.1; convolutions and embeddings as HF peft defines them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.folding import Scratch, row_blocks
from byway.core.slots import Ref, SidePath, first, first_to_see
from byway.core.weights import device_of, features, gives_a_new_tensor, is_transposed
from byway.engine.backward.recompute import dropped
from byway.errors import NotMergeable

__all__ = ["BlockLoRA", "ConvLoRA", "EmbeddingLoRA", "LinearLoRA", "LowRank", "Start"]

Start = tuple[Tensor, Tensor]
"""Factors to start from that already hold part of the weight; their product is subtracted, so that the base keeps its bytes."""


class LowRank(SidePath):
    """What all of them share: two factors, a scale, dropout on the branch's input, and optional starting factors to subtract."""

    peft_names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}  # noqa: RUF012 - a constant

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: float,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.lora_bias = nn.Parameter(torch.zeros(b.shape[0], dtype=b.dtype, device=b.device)) if bias else None
        self.rank_stabilized = rank_stabilized
        self.scale = alpha / self._divisor(self.rank)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None if start is None else start[0])
        self.register_buffer("start_B", None if start is None else start[1])

    @property
    def rank(self) -> int:
        """r, as trained."""
        return self.lora_A.shape[0]

    @property
    def exported_rank(self) -> int:
        """The rank of the plain LoRA that :meth:`export` writes: 2r where starting factors are subtracted."""
        return self.rank if self.start_A is None else 2 * self.rank

    @property
    def exported_alpha(self) -> float:
        """The alpha that gives the same scale at the exported rank."""
        return self.scale * self._divisor(self.exported_rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilized else float(rank)

    def product(self) -> Tensor:
        """s·BA without starting factors' share, as a 2-D matrix."""
        delta = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        if self.start_A is not None and self.start_B is not None:
            delta = delta - self.start_B.flatten(1) @ self.start_A.flatten(1)
        return self.scale * delta.detach()

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """s·B(A(x)) for one pair of factors already in the dtype of x."""
        raise TypeError(f"{type(self).__name__} has no branch")

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x = first(inputs)
        if self.dropout is not None:
            x = dropped(self.dropout, x)
        if self.start_A is None or self.start_B is None:
            return self.add(out, x, self.lora_A, self.lora_B)
        # the difference first: at the start it is exactly 0
        branch = self.branch(x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        return out + (branch - self.branch(x, self.start_A.to(x.dtype), self.start_B.to(x.dtype))).to(out.dtype)

    def add(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """out + s·B(A(x))."""
        return out + self.branch(x, a.to(x.dtype), b.to(x.dtype)).to(out.dtype)

    def fold_bias(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's bias with the branch's own in it; a module without a bias cannot take one."""
        if self.lora_bias is None:
            return {}
        if "bias" not in tensors:
            raise NotMergeable(
                "the branch has a bias of its own (lora_bias) and the module has none to fold it into", "keep it as an adapter"
            )
        return {"bias": tensors["bias"] + self.scale * self.lora_bias.detach().to(tensors["bias"].dtype)}

    def places(self) -> dict[str, Tensor]:
        """The trained factors alone: a file whose start is computed again (PiSSA by peft) holds no more."""
        return super().export()

    def export(self) -> dict[str, Tensor]:
        """Plain LoRA factors: with starting factors ``[A; A₀]`` and ``[B, −B₀]``, of rank 2r."""
        out = self.places()
        if self.start_A is not None and self.start_B is not None:
            names = self.peft_names
            out[names["lora_A"]] = torch.cat([self.lora_A.detach(), self.start_A])
            out[names["lora_B"]] = torch.cat([self.lora_B.detach(), -self.start_B], dim=1)
        return out


class LinearLoRA(LowRank):
    """y = Wx + b + s·B(A(drop(x))); A (r, in), B (out, r), ΔW = s·BA (transposed where the module keeps (in, out))."""

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(a, b, **options)
        self.base = Ref(module)
        self.transposed = is_transposed(module)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a) * self.scale  # (..., r)
        delta = F.linear(hidden, b)  # (..., out)
        return delta if self.lora_bias is None else delta + self.scale * self.lora_bias.to(delta.dtype)

    def add(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        whole = self._writable(out, x)
        if whole is None:
            return super().add(out, x, a, b)
        return AddLowRank.apply(whole, x, a.to(x.dtype), b.to(x.dtype), self.scale).view(out.shape)

    def _writable(self, out: Tensor, x: Tensor) -> Tensor | None:
        """The tensor behind `out` if the sum may be written into it, else None.

        Writing in place rewires the autograd graph: whoever saw `out` before would be cut off from its gradient (a hook, or a custom
        autograd function that returned a view). So the map must be a plain product whose output no other hook or side path has seen.
        """
        # compiled code fuses the sum by itself
        if self.lora_bias is not None or torch.compiler.is_compiling() or x.dim() < 2 or out.dtype != x.dtype:
            return None
        module = self.base.module
        if not (gives_a_new_tensor(module) and first_to_see(module, self)):
            return None
        whole = out._base if out._is_view() else out  # a biased map returns a view of its product
        fits = whole is not None and whole.numel() == out.numel() and whole.is_contiguous() and out.is_contiguous()
        return whole if fits else None

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        out, scratch = weight.clone(), Scratch()
        for rows in row_blocks(weight):
            self.fold_rows(out[rows], rows, scratch.like(out[rows]))
        return tensors | {"weight": out} | self.fold_bias(tensors)

    @property
    def folds_rows(self) -> bool:
        # a class that folds otherwise must not be folded as this one is
        own = type(self)
        return self.lora_bias is None and own.fold is LinearLoRA.fold and own.product is LowRank.product

    def fold_rows(self, weight: Tensor, rows: slice, spare: Tensor) -> None:
        # s and the sum are rounded apart, as in s·BA made whole and added
        delta = self._rows_of(self.lora_B, self.lora_A, rows, spare)
        if self.start_A is not None and self.start_B is not None:
            delta.sub_(self._rows_of(self.start_B, self.start_A, rows, torch.empty_like(spare)))
        weight.add_(delta.mul_(self.scale))

    def fold_bound(self) -> float:
        # Cauchy and Schwarz, row of B by column of A
        pairs: list[Start] = [(self.lora_B, self.lora_A)]
        if self.start_A is not None and self.start_B is not None:
            pairs.append((self.start_B, self.start_A))
        return abs(self.scale) * sum(float(b.detach().norm(dim=1).max() * a.detach().norm(dim=0).max()) for b, a in pairs)

    def _rows_of(self, b: Tensor, a: Tensor, rows: slice, out: Tensor) -> Tensor:
        """These rows of BA in the module's layout, in `out`."""
        b, a = b.detach().to(out.dtype), a.detach().to(out.dtype)
        return torch.mm(a[:, rows].T, b.T, out=out) if self.transposed else torch.mm(b[rows], a, out=out)


class EmbeddingLoRA(LowRank):
    """y = E[i] + s·B·A[:, i]; A (r, entries), B (width, r), ΔE = s·(BA)ᵀ. No dropout, as in loralib."""

    peft_names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "lora_bias": "lora_embedding_B.bias"}  # noqa: RUF012

    def __init__(self, module: nn.Embedding, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(a, b, **{**options, "dropout": 0.0})
        self.padding_idx = module.padding_idx

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.embedding(x, a.T, padding_idx=self.padding_idx) * self.scale  # (..., r)
        return F.linear(hidden, b)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        ids = first(inputs)
        delta = self.branch(ids, self.lora_A, self.lora_B)
        if self.start_A is not None and self.start_B is not None:
            delta = delta - self.branch(ids, self.start_A, self.start_B)
        return out + delta.to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        return tensors | {"weight": weight + self.product().T.to(weight.dtype)}


class ConvLoRA(LowRank):
    """y = conv(x) + s·B∗(A∗drop(x)); A (r, in, k…) with the base's stride, padding and dilation, B (out, r/groups, 1…).

    ΔW[o, i, u, v] = s·Σ_ρ B[o, ρ]·A[ρ, i, u, v]. With groups > 1 the branch mixes all input channels, which a grouped weight cannot hold.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(a, b, **options)
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
        delta = self.convolve(hidden, b, None, 1, 0, 1, self.groups)
        if self.lora_bias is None:
            return delta
        return delta + self.scale * self.lora_bias.to(delta.dtype).reshape(-1, *(1,) * self.spatial)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.groups > 1:
            raise NotMergeable(f"a low-rank branch beside a convolution with {self.groups} groups has no equal in its weight")
        weight = tensors["weight"]
        return tensors | {"weight": weight + self.product().reshape(weight.shape).to(weight.dtype)} | self.fold_bias(tensors)


class AddLowRank(torch.autograd.Function):
    """y ← y + s·B(A(x)), written into y: neither the branch's output nor a second y is made.

    y (..., out), x (..., in), A (r, in), B (out, r). Kept: x, A(x) and the factors.
    ∂x = s·(∂y B)A, ∂A = s·(∂y B)ᵀx, ∂B = s·∂yᵀA(x), and ∂y goes through as it is.
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
        if torch.is_grad_enabled():  # the backward pass is itself differentiated: A(x) must be a function of x and A
            hidden = F.linear(x, a).flatten(0, -2) * ctx.scale
        _, of_x, of_a, of_b, _ = ctx.needs_input_grad
        dh = (dy @ b) * ctx.scale if of_x or of_a else None  # (n, r)
        dx = (dh @ a).view(x.shape) if of_x and dh is not None else None
        da = dh.T @ x.flatten(0, -2) if of_a and dh is not None else None
        return gradients[0], dx, da, dy.T @ hidden if of_b else None, None


class BlockLoRA(LinearLoRA):
    """A fused map (QKV): each enabled one of n equal output blocks has its own rank-r pair, the others none.

    A (r·k, in) for k enabled blocks, B (k·out/n, r); block j's ΔW = s·B_jA_j, disabled blocks exactly zero. Source: loralib, MergedLinear.
    Exported as a plain LoRA of rank r·k whose B is block-diagonal.
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
        wide = torch.einsum("...kr,kor->...ko", hidden, b.unflatten(0, (self.enabled, -1))).flatten(-2)  # (..., k·out/n)
        return wide.new_zeros(*wide.shape[:-1], self.out).index_copy(-1, self.rows, wide)

    def add(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LowRank.add(self, out, x, a, b)

    def product(self) -> Tensor:
        return self.scale * self.spread() @ self.lora_A.detach()

    def spread(self) -> Tensor:
        """B as one matrix (out, k·r): block-diagonal, rows of disabled blocks zero."""
        blocks = torch.block_diag(*self.lora_B.detach().unflatten(0, (self.enabled, -1)))
        return blocks.new_zeros(self.out, blocks.shape[1]).index_copy(0, self.rows, blocks)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        delta = self.product()
        return tensors | {"weight": weight + (delta.T if self.transposed else delta).to(weight.dtype)} | self.fold_bias(tensors)

    def export(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.spread()}
