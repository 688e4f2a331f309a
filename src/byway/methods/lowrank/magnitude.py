"""Weight-decomposed low-rank side paths (DoRA): the length of each row is trained apart from its direction.

V = W + s·BA as a matrix with one row per output feature, n = ‖V‖ per row, W' = (m/n)∘V; m (out,) is ``magnitude``. n is
a constant in the backward pass, and float32 whatever the dtype of the base. The side path adds (m/n − 1)·Wx' +
(m/n)·s·BAx' to the module's output, with x' = drop(x). m/n − 1 is computed as (m − n)/n, which keeps its precision near
zero, and only then cast to the dtype of x.

W is frozen, so ‖W‖² is computed once. The norms then need r products with W, and V is never formed::

    n² = ‖W‖² + 2s·Σ_ρ B∘(WAᵀ) + s²·Σ_ρ B∘(B(AAᵀ))

A row of V with length zero (up to rounding) has no direction. There m/n is taken as 1, so that B can leave zero as in
LoRA. Source: DoRA, arXiv 2402.09353 §4 (§4.3 for the detached norm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.slots import first, slot_of
from byway.core.weights import dense
from byway.methods.lowrank.sides import ConvLoRA, EmbeddingLoRA, LinearLoRA, LowRank, as_rows, like_weight

__all__ = ["ConvDoRA", "Decomposed", "EmbeddingDoRA", "LinearDoRA", "row_norms"]

_TINY = 1e-6
"""A row whose n²/‖W‖² is below this (rounding error) has no direction."""


def row_norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, in float32 or float64."""
    return torch.linalg.vector_norm(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


class Decomposed(LowRank):
    """A low-rank update of the directions, and magnitudes m that start as n, so that attaching changes nothing."""

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, **options: Any) -> None:
        super().__init__(module, a, b, **options)
        self.seen: tuple[int, int] | None = None
        """Address and version of the weight that ``squares`` belongs to, to notice when it is replaced or changed."""
        squares = torch.zeros(self.lora_B.shape[0], dtype=self.lora_A.dtype, device=self.lora_A.device)
        self.squares: Tensor
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(self.norms())

    def spread(self, vector: Tensor) -> Tensor:
        """Reshape a vector (out,) so that it broadcasts over the module's output."""
        return vector

    def base_output(self, x: Tensor) -> Tensor:
        """Return Wx without the bias."""
        raise TypeError(f"{type(self).__name__} has no base")

    def weight(self) -> Tensor:
        """Return W as rows, in its own dtype."""
        return as_rows(self.base.module, dense(self.base.module))

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (R, in) and B (out, R) with W + s·BA = V; R = 2r if initial factors are subtracted."""
        a, b = self.lora_A.detach().flatten(1), self.lora_B.detach().flatten(1)
        if self.start_A is not None and self.start_B is not None:
            return torch.cat([a, self.start_A.flatten(1)]), torch.cat([b, -self.start_B.flatten(1)], dim=1)
        return a, b

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return n (out,) without forming V; 0 for a row that is zero up to rounding."""
        weight = self.weight()
        squares = self._squares(weight)
        a, b = (t.to(squares.dtype) for t in self.pair())
        crossed = 2 * self.scale * (b * (weight.to(squares.dtype) @ a.T)).sum(1)
        own = self.scale**2 * (b * (b @ (a @ a.T))).sum(1)
        total = squares + crossed + own
        return torch.where(total > _TINY * squares, total, 0.0).clamp_min(0.0).sqrt()

    def directions(self) -> Tensor:
        """Return V as rows, in float32 or float64."""
        weight = self.weight()
        a, b = self.pair()
        kept = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(kept) + self.scale * (b @ a).to(kept)

    def _squares(self, weight: Tensor) -> Tensor:
        """Return ‖W‖² per row; recompute it if the weight was replaced or changed."""
        kept = torch.promote_types(weight.dtype, torch.float32)
        if torch.compiler.is_compiling() and self.squares.dtype == kept:
            return self.squares  # dynamo cannot read a tensor's address; loading a state dict refreshes it (below)
        owner = self.base.module.weight
        assert isinstance(owner, Tensor)
        version = 0 if owner.is_inference() else owner._version
        if self.seen != (owner.data_ptr(), version) or self.squares.dtype != kept or self.squares.device != weight.device:
            self.squares = row_norms(weight).square()
            self.seen = (owner.data_ptr(), version)
        return self.squares

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.seen = None
        self._squares(self.weight())  # a module's own tensors are loaded before those of its children

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return m/n − 1 and m/n, both (out,), in the dtype of m; 0 and 1 for a row without direction."""
        norms = self.norms()
        there = norms > 0
        safe = torch.where(there, norms, 1.0)
        change = torch.where(there, (self.magnitude - safe) / safe, 0.0)
        return change, torch.where(there, self.magnitude / safe, 1.0)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x = first(inputs)
        change, ratio = self.ratios()
        if self.dropout is not None and self.training:
            x = self.dropout(x)
            base = self.base_output(x)
        else:
            base = self._undropped(x, out)
        delta = self.update(x).to(base.dtype)
        return out + (self.spread(change.to(base.dtype)) * base + self.spread(ratio.to(base.dtype)) * delta).to(out.dtype)

    def _undropped(self, x: Tensor, out: Tensor) -> Tensor:
        """Return Wx: from the module's output if no side path has changed it yet, else recomputed."""
        slot = slot_of(self.base.module)
        if slot is None or slot.answering or not slot.afters or slot.afters[0] is not self:
            return self.base_output(x)
        bias = self.base.module._parameters.get("bias")
        return out if bias is None else out - self.spread(bias.to(out.dtype))

    @torch.no_grad()
    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, module = tensors["weight"], self.base.module
        rows = self.directions()
        norms = row_norms(rows)
        there = self.norms() > 0  # the forward's criterion for which rows have a direction
        ratio = torch.where(there, self.magnitude.to(rows.dtype) / torch.where(there, norms, 1.0), 1.0)
        # add a difference, to keep what other side paths have already folded in
        change = ratio[:, None] * rows - self.weight().to(rows.dtype)
        return tensors | {"weight": weight + like_weight(module, change, weight.shape).to(weight.dtype)}


class LinearDoRA(Decomposed, LinearLoRA):
    """y = W'x + b, W' = (m/n)∘(W + s·BA); A (r, in), B (out, r), m (out,)."""

    peft_names = LinearLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def base_output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype))


class EmbeddingDoRA(Decomposed, EmbeddingLoRA):
    """y = (m/n)∘(E[i] + s·B·A[:, i]), n per feature over all entries; A (r, entries), B (width, r), m (width,)."""

    peft_names = EmbeddingLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def base_output(self, x: Tensor) -> Tensor:
        module = self.base.module
        return type(module).forward(module, x)


class ConvDoRA(Decomposed, ConvLoRA):
    """y = W'∗x + b, n per output channel over input channels and kernel; A (r, in, k…), B (out, r, 1…), m (out,)."""

    peft_names = ConvLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def spread(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self.spatial)

    def base_output(self, x: Tensor) -> Tensor:
        if self.pad_by:
            x = F.pad(x, self.pad_by, mode=self.padding_mode)
        weight = dense(self.base.module).to(x.dtype)
        return self.convolve(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def destinations(self) -> dict[str, Tensor]:
        """Return them in peft's shapes: magnitudes are (1, out, 1…)."""
        out = super().destinations()
        name = self.peft_names["magnitude"]
        return out | {name: out[name].view(1, -1, *(1,) * self.spatial)}
