"""AdaLoRA's side path, ΔW = s·B(E∘A) with E (r,) as singular values, and the pruning of its triplets (A_i, E_i, B_i).

The importance of a parameter p is I = |p·∂L/∂p|, smoothed: Ī ← β1·Ī + (1−β1)·I. Its uncertainty is
Ū ← β2·Ū + (1−β2)·|I − Ī|, its score Ī·Ū. The score of triplet i is score(E_i), plus the mean over row i of A, plus the
mean over column i of B. The budget of all maps together falls along a cubic from all triplets to the target; E_i of the
triplets with the lowest scores is set to zero. E still receives gradients, so a triplet may come back until the last
allocation. Source: Zhang et al., arXiv 2303.10512 §3; the scale and the order of the calls follow the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.slots import SidePath, first
from byway.core.weights import device_of, factor_dtype, features, is_transposed
from byway.errors import AdapterError

__all__ = ["AdaptiveRank", "Group", "Schedule", "allocate"]

_SMALL = 1e-5
"""Added to the rank in the scale, as in the authors' code."""
_SPREAD = 0.02
"""Standard deviation of the initial A and B."""
_FACTORS = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True)
class Schedule:
    """When the budget falls: after step `initial`, along a cubic, until step `total` − `final`."""

    initial: int
    final: int
    interval: int
    """Steps between two allocations."""
    total: int

    def budget(self, step: int, start: int, end: int) -> int:
        """Return the number of triplets to keep at `step`: ⌊end + (start − end)·(1 − progress)³⌋."""
        if step <= self.initial:
            return start
        if step > self.total - self.final:
            return end
        left = 1 - (step - self.initial) / (self.total - self.final - self.initial)
        return int((start - end) * left**3 + end)

    def masks(self, step: int) -> bool:
        """True if triplets are pruned at `step`."""
        return step > self.initial and (step > self.total - self.final or step % self.interval == 0)


class Group:
    """The number of side paths of one adapter: the penalty is a mean over all of them."""

    def __init__(self) -> None:
        self.size = 0


class AdaptiveRank(SidePath):
    """y = f(x) + s·B((E∘A)(drop(x))); A (r, in), E (r, 1), B (out, r).

    s = alpha/(r₀ + 1e-5) with the initial rank r₀, also after triplets are pruned.
    """

    peft_names = {"lora_A": "lora_A", "lora_E": "lora_E", "lora_B": "lora_B"}  # noqa: RUF012 - a constant of the class

    def __init__(
        self,
        module: nn.Module,
        rank: int,
        *,
        initial_rank: int,
        alpha: float,
        dropout: float,
        penalty_weight: float,
        group: Group,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        inside, outside = features(module)
        dtype, device = factor_dtype(module), device_of(module)
        normal: dict[str, Any] = {"generator": generator, "dtype": dtype}
        self.lora_A = nn.Parameter((_SPREAD * torch.randn(rank, inside, **normal)).to(device))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, dtype=dtype, device=device))
        self.lora_B = nn.Parameter((_SPREAD * torch.randn(outside, rank, **normal)).to(device))
        self.transposed = is_transposed(module)
        self.initial_rank = initial_rank
        self.scale = alpha / (initial_rank + _SMALL)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.penalty_weight, self.group = penalty_weight, group
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=device))
        """(r,) True for the triplets that the last allocation kept."""
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(2, dtype=torch.long, device=device))
        """Last step and total steps, from which a file's schedule is written."""
        for name in _FACTORS:
            parameter = self.get_parameter(name)
            self.register_buffer(f"importance_{name[-1]}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"uncertainty_{name[-1]}", torch.zeros_like(parameter, requires_grad=False))

    @property
    def rank(self) -> int:
        """Number of triplets, including those set to zero."""
        return self.lora_A.shape[0]

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x = first(inputs)
        if self.dropout is not None:
            x = self.dropout(x)
        hidden = F.linear(x, (self.lora_A * self.lora_E).to(x.dtype))  # (..., r)
        return out + (F.linear(hidden, self.lora_B.to(x.dtype)) * self.scale).to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        delta = self.scale * (self.lora_B @ (self.lora_A * self.lora_E)).detach()
        return tensors | {"weight": weight + (delta.T if self.transposed else delta).to(weight.dtype)}

    def penalty(self) -> Tensor | None:
        """Return this side path's share of γ·mean(‖AAᵀ − I‖, ‖BᵀB − I‖), the mean over all A and B of the adapter."""
        if self.penalty_weight == 0 or self.rank == 0:
            return None
        identity = torch.eye(self.rank, dtype=self.lora_A.dtype, device=self.lora_A.device)
        right = torch.linalg.matrix_norm(self.lora_A @ self.lora_A.T - identity)
        left = torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - identity)
        return self.penalty_weight * (right + left) / (2 * self.group.size)

    def living(self) -> Tensor:
        """Return (r,) bool: True for triplets that the last allocation kept, or that have come back since."""
        return self.kept | (self.lora_E.detach().flatten() != 0)

    def export(self) -> dict[str, Tensor]:
        """Return the triplets that :meth:`living` selects."""
        living = self.living()
        if bool(living.all()):
            return super().export()
        a, e, b = self.lora_A.detach(), self.lora_E.detach(), self.lora_B.detach()
        return {"lora_A": a[living], "lora_E": e[living], "lora_B": b[:, living].contiguous()}

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> bool:
        """Update importance and uncertainty from the gradients of this step; return False if there are none."""
        there = False
        for name in _FACTORS:
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                continue
            there = True
            importance, uncertainty = self.get_buffer(f"importance_{name[-1]}"), self.get_buffer(f"uncertainty_{name[-1]}")
            now = (parameter * parameter.grad).abs()
            importance.mul_(beta1).add_(now, alpha=1 - beta1)
            uncertainty.mul_(beta2).add_((now - importance).abs(), alpha=1 - beta2)
        return there

    def scores(self) -> Tensor:
        """Return the score of each triplet, (r,)."""
        a, e, b = (self.get_buffer(f"importance_{n[-1]}") * self.get_buffer(f"uncertainty_{n[-1]}") for n in _FACTORS)
        return e.flatten() + a.mean(1) + b.mean(0)

    @torch.no_grad()
    def prune(self, threshold: float) -> None:
        """Keep only the triplets with a score above `threshold`."""
        self.kept.copy_(self.scores() > threshold)
        self.silence()

    @torch.no_grad()
    def silence(self) -> None:
        """Set E = 0 for the triplets that the last allocation did not keep."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    @torch.no_grad()
    def forget(self) -> None:
        """Reset the statistics, which are not needed after the last allocation."""
        for name in _FACTORS:
            self.get_buffer(f"importance_{name[-1]}").zero_()
            self.get_buffer(f"uncertainty_{name[-1]}").zero_()


def allocate(sides: Sequence[AdaptiveRank], schedule: Schedule, step: int, *, target: int, betas: tuple[float, float]) -> None:
    """Update the importance after optimizer step `step` (from 1) and, if it is due, reallocate the budget.

    At step total − `final` comes the last allocation; after it, pruned triplets stay at zero.

    Raises:
        AdapterError: the gradients of the step are no longer there.
    """
    last = schedule.total - schedule.final
    for side in sides:
        side.progress.copy_(torch.tensor([step, schedule.total]))
    if step > last:
        for side in sides:
            side.silence()
        return
    seen = [side.observe(*betas) for side in sides] if step < last else [True]
    if not any(seen):
        raise AdapterError("AdaLoRA needs the gradients of the step, and they are gone", "call after_step before zero_grad")
    if step == last or schedule.masks(step):
        _prune(sides, schedule.budget(step, sum(side.rank for side in sides), target))
    if step == last:
        for side in sides:
            side.forget()


def _prune(sides: Sequence[AdaptiveRank], budget: int) -> None:
    """Keep the `budget` triplets with the highest scores over all maps."""
    scores = torch.cat([side.scores().flatten() for side in sides])
    too_many = scores.numel() - budget
    if too_many <= 0:
        return
    threshold = float(torch.kthvalue(scores, too_many).values)
    for side in sides:
        side.prune(threshold)
