"""AdamW over the adapters' parameters; the learning rate is a pure function of the step.

θ ← θ − η_s·(m̂/(√v̂ + ε) + λθ); Loshchilov & Hutter, arXiv 1711.05101. The parameters are the side paths' float32
tensors, whatever the base's dtype, so that no update is lost to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byway.core.fields import shown
from byway.errors import AdapterError, ConfigError, listed
from byway.train.state import differences

if TYPE_CHECKING:
    from byway.core.adapter import Adapter
    from byway.recipe.sections import Train

__all__ = ["Optimizer", "Schedule", "warmup_steps"]

_SHAPES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    "linear": lambda p: 1.0 - p,
    "constant": lambda p: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """factor(s), 0 ≤ s < total: (s+1)/(warmup+1) while s < warmup, then shape((s−warmup)/(total−warmup)), from 1."""

    kind: str
    warmup: int
    total: int

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate in update `step` (from 0); never 0, so that no update is wasted."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return _SHAPES[self.kind]((step - self.warmup) / max(self.total - self.warmup, 1))


def warmup_steps(train: Train, total: int) -> int:
    """Return the warm-up in steps: as given, or the ratio's share of `total`, rounded up, at most ``total - 1``."""
    if train.warmup_steps is not None:
        if train.warmup_steps >= total:
            raise ConfigError(
                f"train.warmup_steps is {train.warmup_steps}, but the run has {total} steps: the warm-up would never end",
                "make it smaller, or train longer",
            )
        return train.warmup_steps
    return min(math.ceil((train.warmup_ratio or 0.0) * total), max(total - 1, 0))


def _blank(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first update."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


class Optimizer:
    """torch's AdamW over some adapters, with names: state is saved by parameter name, not by position."""

    def __init__(self, adapters: Sequence[Adapter], train: Train, schedule: Schedule) -> None:
        self.schedule = schedule
        self.max_norm = train.max_grad_norm
        self.names = {id(p): name for adapter in adapters for name, p in adapter.named_parameters()}
        groups = [group for adapter in adapters for group in adapter.method.param_groups(adapter, train.learning_rate)]
        given = [id(p) for group in groups for p in group["params"]]
        if sorted(given) != sorted(self.names):
            raise AdapterError("param_groups must contain each trainable tensor of the adapter exactly once")
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.rates = [float(group.get("lr", train.learning_rate)) for group in groups]
        self.adamw = torch.optim.AdamW(
            groups,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            foreach=True,
        )
        half = any(p.dtype == torch.float16 for p in adapters[0].model.parameters())
        # float16 loses gradients below 6e-8 unless the loss is scaled up
        self.scaler = torch.amp.GradScaler("cuda", enabled=half)

    def rate(self, step: int) -> float:
        """Return the learning rate of the first group in update `step` (from 0)."""
        return self.rates[0] * self.schedule.factor(step)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, scaled if the base computes in float16."""
        self.scaler.scale(loss).backward()

    def norm(self) -> float:
        """Return ‖g‖₂ over all trainable tensors, without the loss scale; if finite, clip to `max_grad_norm`."""
        self.scaler.unscale_(self.adamw)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        if self.max_norm is not None and math.isfinite(float(total)):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, total)
        return float(total)

    def update(self, step: int, then: Callable[[], None] | None = None) -> None:
        """Apply update number `step` (from 0), call `then` while the gradients still exist, and clear them."""
        factor = self.schedule.factor(step)
        for group, rate in zip(self.adamw.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.scaler.step(self.adamw)
        if then is not None:
            then()
        self.skip()

    def skip(self) -> None:
        """Clear the gradients without an update."""
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)

    @property
    def rescaling(self) -> bool:
        """True if an infinite gradient may only mean that the loss scale of float16 is still too high."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1.0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors by ``NAME/KEY``, plain values): what updates depend on besides parameters and gradients."""
        tensors = {
            f"{self.names[id(p)]}/{key}": value
            for p in self.parameters
            for key, value in (self.adamw.state.get(p) or _blank(p)).items()  # none yet: as AdamW would start it
        }
        return tensors, {"scaler": self.scaler.state_dict()}

    def misfits(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], updates: int) -> list[str]:
        """Say why a state of :meth:`state` is not one of this optimizer after at most `updates` updates."""
        own = {f"{self.names[id(p)]}/{key}": value for p in self.parameters for key, value in _blank(p.detach().to("meta")).items()}
        problems = differences(own, tensors)
        for name in self.names.values() if not problems else ():
            count, mean, square = (tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq"))
            counted = bool(count == count.round()) and 0 <= float(count) <= updates
            begun = float(count) > 0 or not (bool(mean.any()) or bool(square.any()))
            if not (counted and begun and bool(mean.isfinite().all()) and bool((square.isfinite() & (square >= 0)).all())):
                problems.append(f"the moments of {name} are not those of at most {updates:,} updates")
        scaler, given = self.scaler.state_dict(), plain["scaler"]
        if given.keys() != scaler.keys():
            problems.append(f"the loss scale is {shown(given)}; it must have {listed(scaler) or 'no entries'}")
        return problems

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned for these parameters."""
        by_name = {self.names[id(p)]: p for p in self.parameters}
        for key, value in tensors.items():
            name, _, part = key.rpartition("/")
            parameter = by_name[name]
            # AdamW counts its updates on the CPU
            self.adamw.state[parameter][part] = value.clone() if part == "step" else value.to(parameter.device, copy=True)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(plain["scaler"]))
