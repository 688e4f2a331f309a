r"""AdaLoRA: y = Wx + s·B(E∘A(drop(x))), with E like singular values; the least important ones lose their place as training goes on.

::

    x ──┬────── W (frozen) ────────────(+)── y      A (r₀, in)    E (r₀, 1)    B (out, r₀)
        └─ drop ── A ── ·E ── B ── ·s ──┘           ΔW = s·B(E∘A), s = alpha/(r₀ + 1e-5)

Σ r₀ triplets at the start, rank for each map on average at the end, distributed over all maps by importance. Added to the loss:
γ·mean(‖AAᵀ − I‖, ‖BᵀB − I‖). Source: Zhang et al., arXiv 2303.10512 §3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from byway.core.fields import bias_problems, dropout_problems, finite, whole
from byway.core.method import BuildContext
from byway.core.slots import SidePath, Site
from byway.core.weights import features, is_linear, is_transposed
from byway.errors import ConfigError, TargetError
from byway.methods.lowrank.adaptive import AdaptiveRank, Group, Schedule, allocate
from byway.methods.lowrank.method import trained_biases
from byway.methods.lowrank.targeted import TargetedMethod

if TYPE_CHECKING:
    from byway.core.method import Attached

__all__ = ["AdaLoRA"]

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_E(?:\..+)?")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(TargetedMethod):
    """Low-rank updates of linear maps that share one budget of ranks, given to the maps where they matter.

    Attaching leaves the output as it is: E starts at zero. Trained: initial_rank·(in + out + 1) numbers a module, plus what `bias` and
    `modules_to_save` name. :meth:`after_step` must be called after each optimizer step, before the gradients are cleared, and the side
    paths' penalty added to the loss: ``byway train`` does both, transformers' Trainer does neither.

    Raises:
        ConfigError: a value out of range, or a run too short for the schedule.
        TargetError: something named is not in the model, or is no linear map.
    """

    rank: int = 8
    """The mean rank of a map at the end."""
    initial_rank: int = 12
    """r₀: the rank of each map at the start."""
    alpha: float = 16.0
    """The update is scaled by alpha/(initial_rank + 1e-5), also when ranks were taken away."""
    dropout: float = 0.0
    """Dropout on the branch's input, in [0, 1)."""
    targets: str | Sequence[str] | None = None
    """``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list of names; none: by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""
    initial_steps: int | float = 0.1
    """Steps before the first rank is taken away; below 1 a share of the run."""
    final_steps: int | float = 0.3
    """Steps at the end in which the ranks stay as they are; below 1 a share of the run."""
    interval: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    """How slowly the importance follows the gradients, between 0 and 1."""
    beta2: float = 0.85
    """How slowly its uncertainty does."""
    orthogonality: float = 0.1
    """γ: the weight of the penalty that keeps A's rows and B's columns orthonormal."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too, beside the base: none, all, or those of the adapted modules."""
    rank_pattern: Mapping[str, int] | None = None
    """Ranks that maps are left with, by path: filled when an adapter is loaded whose ranks were taken away."""

    peft_type: ClassVar[str | None] = "ADALORA"
    mergeable: ClassVar[bool] = True
    rank_name: ClassVar[str] = "initial rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name} is {value!r}; it must be a whole number from 1 on"
            for name, value in (("rank", self.rank), ("initial_rank", self.initial_rank), ("interval", self.interval))
            if not whole(value) or value < 1
        ]
        if not problems and self.rank > self.initial_rank:
            problems.append(f"rank is {self.rank}, more than the initial_rank, {self.initial_rank}; ranks are only taken away")
        if not finite(self.alpha) or self.alpha <= 0:
            problems.append(f"alpha is {self.alpha!r}; it must be a positive number")
        problems += dropout_problems(self.dropout)
        problems += [
            f"{name} is {value!r}; it must be a whole number from 0 on, or a share of the run below 1"
            for name, value in (("initial_steps", self.initial_steps), ("final_steps", self.final_steps))
            if not finite(value) or value < 0 or (value >= 1 and not whole(value))
        ]
        if not problems and all(0 < s < 1 for s in (self.initial_steps, self.final_steps)) and self.initial_steps + self.final_steps >= 1:
            problems.append("initial_steps and final_steps take the whole run; nothing is left for taking ranks away")
        problems += [
            f"{name} is {value!r}; it must be above 0 and below 1"
            for name, value in (("beta1", self.beta1), ("beta2", self.beta2))
            if not finite(value) or not 0 < value < 1
        ]
        if not finite(self.orthogonality) or self.orthogonality < 0:
            problems.append(f"orthogonality is {self.orthogonality!r}; it must be 0 or more")
        problems += bias_problems(self.bias)
        if any(not whole(r) or not 0 <= r <= self.initial_rank for r in (self.rank_pattern or {}).values()):
            problems.append(f"rank_pattern must hold whole numbers from 0 to the initial_rank; it is {dict(self.rank_pattern or {})!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        from byway.core.targets.resolve import resolve
        from byway.core.targets.search import ALL_LINEAR

        patterns = {"rank_pattern": self.rank_pattern or {}}
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, patterns=patterns, notes=notes)
        return found, self.targets == ALL_LINEAR

    def too_narrow(self, site: Site) -> bool:
        return self.initial_rank > min(features(site.module))

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            inside, outside = features(site.module)
            if self.initial_rank > min(inside, outside):
                raise TargetError(
                    f"initial_rank {self.initial_rank} is more than {site.path} can use ({inside} in, {outside} out)",
                    f"choose one of at most {min(inside, outside)}",
                )

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        from byway.core.targets.resolve import pattern_value

        if not is_linear(site.module):
            raise TargetError(f"{site.path} is a {type(site.module).__name__}: AdaLoRA adapts linear maps only", "exclude it")
        group: Group = context.shared.setdefault(self, Group())
        group.size += 1
        return AdaptiveRank(
            site.module,
            pattern_value(site.path, self.rank_pattern or {}, self.initial_rank),
            initial_rank=self.initial_rank,
            alpha=self.alpha,
            dropout=self.dropout,
            penalty_weight=self.orthogonality,
            group=group,
            generator=context.generator,
        )

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        yield from trained_biases(model, self.bias, planned)

    def schedule(self, total: int) -> Schedule:
        """The budget's schedule in a run of `total` steps; ConfigError if nothing is left between its ends."""
        initial, final = (int(s * total) if s < 1 else int(s) for s in (self.initial_steps, self.final_steps))
        if initial + final >= total:
            raise ConfigError(
                f"the run has {total} steps, and initial_steps and final_steps take {initial} + {final}: no rank could be taken away",
                "make them smaller, or train longer",
            )
        return Schedule(initial, final, self.interval, total)

    def after_step(self, adapter: Attached, step: int, total: int) -> None:
        sides = [side for _, side in adapter.side_paths() if isinstance(side, AdaptiveRank)]
        allocate(sides, self.schedule(total), step, target=self.rank * len(sides), betas=(self.beta1, self.beta2))

    def to_peft(self) -> dict[str, Any]:
        return {
            "target_r": self.rank,
            "init_r": self.initial_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "deltaT": self.interval,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "bias": self.bias,
        }

    def peft_fields(self, hung: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """The schedule in steps (peft demands a total; 1 where nothing was trained), and which triplets of each map are in the file."""
        sides = {site.path: side for site, side in hung if isinstance(side, AdaptiveRank)}
        total = max((int(side.progress[1]) for side in sides.values()), default=0)
        steps = self.schedule(total) if total else Schedule(0, 0, self.interval, 1)
        living = {f"{path}.lora_E": side.living().tolist() + [False] * (self.initial_rank - side.rank) for path, side in sides.items()}
        return {
            "tinit": steps.initial,
            "tfinal": steps.final,
            "total_step": steps.total,
            "fan_in_fan_out": any(is_transposed(site.module) for site, _ in hung),
            "rank_pattern": None if all(map(all, living.values())) else living,
        }

    @classmethod
    def normalized_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """With ``rank_pattern`` as path → how many triplets are there; peft writes a flag for each, under the name of E."""
        ranks: dict[str, int] = {}
        for key, flags in (config.get("rank_pattern") or {}).items():
            match = _KEY.fullmatch(key)
            if match is None or not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
                raise ConfigError(f"rank_pattern {key!r} is not a list of true and false under the name of a lora_E")
            ranks["^" + match["path"].replace(".", r"\.")] = sum(flags)
        return dict(config) | {"rank_pattern": ranks or None}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLoRA:
        initial = config.get("init_r", 12)
        alpha = float(config.get("lora_alpha", 8))
        return cls(
            rank=config.get("target_r", 8),
            initial_rank=initial,
            alpha=alpha if alpha > 0 else float(initial),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=config.get("target_modules"),
            initial_steps=config.get("tinit", 0),
            final_steps=config.get("tfinal", 0),
            interval=config.get("deltaT", 1),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            orthogonality=config.get("orth_reg_weight", 0.5),
            bias=config.get("bias", "none"),
            rank_pattern=config.get("rank_pattern") or None,
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )
