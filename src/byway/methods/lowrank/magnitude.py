"""Weight-decomposed low-rank side paths (DoRA): the row's length is trained apart from its direction.

V = W + s·BA as a matrix with one row for each output feature, n = ‖V‖ per row, W' = (m/n)∘V; m (out,) is ``magnitude``. n is a constant in
back-propagation and float32 whatever the base is. What is added to the module's output is (m/n − 1)·Wx' + (m/n)·s·BAx', with x' = drop(x);
m/n − 1 is computed as (m − n)/n, so that it keeps its digits near zero, and only then cast to the dtype of x.

W is frozen, so ‖W‖² is computed once and the rest follows without forming V (r products with W instead of r plus three passes over it)::

    n² = ‖W‖² + 2s·Σ_ρ B∘(WAᵀ) + s²·Σ_ρ B∘(B(AAᵀ))

A row of V whose length is zero, but for rounding, has no direction. There m/n counts as 1, so that B can leave zero as in LoRA.
Source: DoRA, arXiv 2402.09353 §4 (§4.3 for the detached norm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.slots import Ref, first, slot_of
from byway.core.weights import dense, is_embedding, is_transposed
from byway.methods.lowrank.sides import ConvLoRA, EmbeddingLoRA, LinearLoRA, LowRank

__all__ = ["ConvDoRA", "Decomposed", "EmbeddingDoRA", "LinearDoRA", "as_rows", "like_weight", "row_norms"]

_TINY = 1e-6
"""n²/‖W‖² below this is rounding: the row has no direction."""


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as a matrix with one row for each output feature: (out, in), (out, in·k…) of a convolution, (width, entries)."""
    return weight.T if is_transposed(module) or is_embedding(module) else weight.flatten(1)


def like_weight(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`as_rows`: `rows` in the module's own layout and `shape`."""
    return rows.T if is_transposed(module) or is_embedding(module) else rows.reshape(shape)


def row_norms(rows: Tensor) -> Tensor:
    """‖·‖ of each row, in float32 at least."""
    return torch.linalg.vector_norm(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


class Decomposed(LowRank):
    """What they share: the magnitudes, the norms and how both act on what comes out."""

    def decompose(self, module: nn.Module) -> None:
        """Start: m = n, so that nothing changes."""
        self.base = Ref(module)
        self.seen: tuple[int, int] | None = None
        """Which weight ‖W‖² is of (address and version), so that one that was replaced is noticed."""
        squares = torch.zeros(self.out_features, dtype=self.lora_A.dtype, device=self.lora_A.device)
        self.squares: Tensor
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(self.norms())

    @property
    def out_features(self) -> int:
        """How many rows V has."""
        return self.lora_B.shape[0]

    def spread(self, vector: Tensor) -> Tensor:
        """A number for each output feature, in the shape that multiplies an output."""
        return vector

    def base_output(self, x: Tensor) -> Tensor:
        """Wx without bias."""
        raise TypeError(f"{type(self).__name__} has no base")

    def weight(self) -> Tensor:
        """W as rows, as it is kept."""
        return as_rows(self.base.module, dense(self.base.module))

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) with W + s·BA = V: the factors, with what they started from subtracted."""
        a, b = self.lora_A.detach().flatten(1), self.lora_B.detach().flatten(1)
        if self.start_A is not None and self.start_B is not None:
            return torch.cat([a, self.start_A.flatten(1)]), torch.cat([b, -self.start_B.flatten(1)], dim=1)
        return a, b

    @torch.no_grad()
    def norms(self) -> Tensor:
        """n (out,), without forming V; 0 where it is below what rounding leaves."""
        weight = self.weight()
        squares = self._squares(weight)
        a, b = (t.to(squares.dtype) for t in self.pair())
        crossed = 2 * self.scale * (b * (weight.to(squares.dtype) @ a.T)).sum(1)
        own = self.scale**2 * (b * (b @ (a @ a.T))).sum(1)
        total = squares + crossed + own
        return torch.where(total > _TINY * squares, total, 0.0).clamp_min(0.0).sqrt()

    @torch.no_grad()
    def plain_norms(self) -> Tensor:
        """The same by forming V: the twin that :meth:`norms` is measured by."""
        return row_norms(self.directions())

    def directions(self) -> Tensor:
        """V as rows, in float32 at least."""
        weight = self.weight()
        a, b = self.pair()
        kept = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(kept) + self.scale * (b @ a).to(kept)

    def _squares(self, weight: Tensor) -> Tensor:
        """‖W‖² per row, computed when the weight is another one than before."""
        kept = torch.promote_types(weight.dtype, torch.float32)
        if torch.compiler.is_compiling() and self.squares.dtype == kept:
            return self.squares  # dynamo cannot read a tensor's address; loading into the base refreshes it (below)
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
        self._squares(self.weight())  # a base's own tensors are loaded before those below it

    def ratios(self) -> tuple[Tensor, Tensor]:
        """(m/n − 1, m/n), both (out,) in m's dtype; (0, 1) for a row without direction. n is a constant."""
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
        delta = self.update(x, base.dtype)
        return out + (self.spread(change.to(base.dtype)) * base + self.spread(ratio.to(base.dtype)) * delta).to(out.dtype)

    def update(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """s·BAx, with the starting factors' share subtracted."""
        given = x if x.is_floating_point() else self.lora_A
        delta = self.branch(x, self.lora_A.to(given.dtype), self.lora_B.to(given.dtype))
        if self.start_A is not None and self.start_B is not None:
            delta = delta - self.branch(x, self.start_A.to(given.dtype), self.start_B.to(given.dtype))
        return delta.to(dtype)

    def _undropped(self, x: Tensor, out: Tensor) -> Tensor:
        """Wx: what came out of the module where nobody has changed it yet, else computed again."""
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
        there = self.norms() > 0  # as the forward decides which rows have a direction
        ratio = torch.where(there, self.magnitude.to(rows.dtype) / torch.where(there, norms, 1.0), 1.0)
        # a difference, so that what another side path has already folded in is kept
        change = ratio[:, None] * rows - self.weight().to(rows.dtype)
        return tensors | {"weight": weight + like_weight(module, change, weight.shape).to(weight.dtype)}


class LinearDoRA(Decomposed, LinearLoRA):
    """y = W'x + b, W' = (m/n)∘(W + s·BA); A (r, in), B (out, r), m (out,)."""

    peft_names = LinearLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, **options: Any) -> None:
        LinearLoRA.__init__(self, module, a, b, **options)
        self.decompose(module)

    def base_output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype))


class EmbeddingDoRA(Decomposed, EmbeddingLoRA):
    """y = (m/n)∘(E[i] + s·B·A[:, i]), n over all entries for each feature; A (r, entries), B (width, r), m (width,)."""

    peft_names = EmbeddingLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def __init__(self, module: nn.Embedding, a: Tensor, b: Tensor, **options: Any) -> None:
        EmbeddingLoRA.__init__(self, module, a, b, **options)
        self.decompose(module)

    def base_output(self, x: Tensor) -> Tensor:
        module = self.base.module
        return type(module).forward(module, x)


class ConvDoRA(Decomposed, ConvLoRA):
    """y = W'∗x + b, n over input channels and kernel for each output channel; A (r, in, k…), B (out, r, 1…), m (out,)."""

    peft_names = ConvLoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor, b: Tensor, **options: Any) -> None:
        ConvLoRA.__init__(self, module, a, b, **options)
        self.decompose(module)

    def spread(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self.spatial)

    def base_output(self, x: Tensor) -> Tensor:
        if self.pad_by:
            x = F.pad(x, self.pad_by, mode=self.padding_mode)
        weight = dense(self.base.module).to(x.dtype)
        return self.convolve(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def places(self) -> dict[str, Tensor]:
        """As peft keeps it: the magnitudes are (1, out, 1…)."""
        out = super().places()
        name = self.peft_names["magnitude"]
        return out | {name: out[name].view(1, -1, *(1,) * self.spatial)}
