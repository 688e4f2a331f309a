r"""AdaLoRA: y = Wx + s·B(E∘A(drop(x))), with E like singular values; the least important are pruned during training.

::

    x ──┬────── W (frozen) ────────────(+)── y      A (r₀, in)    E (r₀, 1)    B (out, r₀)
        └─ drop ── A ── ·E ── B ── ·s ──┘           ΔW = s·B(E∘A), s = alpha/(r₀ + 1e-5)

Each map starts with r₀ triplets (A_i, E_i, B_i) and ends with `rank` on average, distributed over all maps by
importance. Added to the loss: γ·mean(‖AAᵀ − I‖, ‖BᵀB − I‖). Source: Zhang et al., arXiv 2303.10512 §3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from byway.core.copies import untrained_biases
from byway.core.fields import Count, Dropout, Layers, NotNegative, Positive, Rank
from byway.core.method import Attached, BuildContext
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site
from byway.core.targets.resolve import pattern_value, resolve
from byway.core.targets.search import ALL_LINEAR
from byway.core.weights import features, is_linear, is_transposed
from byway.errors import ConfigError, TargetError
from byway.methods.lowrank.adaptive import AdaptiveRank, Group, Schedule, allocate
from byway.methods.lowrank.method import TrainedBiases, trained_biases
from byway.methods.lowrank.targeted import TargetedMethod

__all__ = ["AdaLoRA"]

Steps = Annotated[int, Ge(0), Le(10**9)] | Annotated[float, Ge(0), Lt(1)]
Decay = Annotated[float, Gt(0), Lt(1)]
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_E(?:\..+)?")


class _AdaLoRAPeftFormat(PeftFormat["AdaLoRA"]):
    def fields(self, method: AdaLoRA) -> dict[str, Any]:
        return {
            "target_r": method.rank,
            "init_r": method.initial_rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "deltaT": method.interval,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orthogonality,
            "bias": method.bias,
        }

    def site_fields(self, method: AdaLoRA, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the schedule in steps (peft needs a total; 1 before training), and the triplets in the file."""
        sides = {site.path: side for site, side in installed if isinstance(side, AdaptiveRank)}
        total = max((int(side.progress[1]) for side in sides.values()), default=0)
        steps = method.schedule(total) if total else Schedule(0, 0, method.interval, 1)
        living = {f"{path}.lora_E": side.living().tolist() + [False] * (method.initial_rank - side.rank) for path, side in sides.items()}
        return {
            "tinit": steps.initial,
            "tfinal": steps.final,
            "total_step": steps.total,
            "fan_in_fan_out": any(is_transposed(site.module) for site, _ in installed),
            "rank_pattern": None if all(map(all, living.values())) else living,
        }

    def normalized(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Turn peft's ``rank_pattern`` (name of E → one flag per triplet) into path → number of triplets."""
        ranks: dict[str, int] = {}
        for key, flags in (config.get("rank_pattern") or {}).items():
            match = _KEY.fullmatch(key)
            if match is None or not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
                raise ConfigError(f"rank_pattern: {key!r} is not a list of true and false under the name of a lora_E")
            ranks["^" + match["path"].replace(".", r"\.")] = sum(flags)
        return dict(config) | {"rank_pattern": ranks or None}

    def method(self, kind: type[AdaLoRA], config: Mapping[str, Any]) -> AdaLoRA:
        initial = config.get("init_r", 12)
        alpha = float(config.get("lora_alpha", 8))
        return kind(
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


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(TargetedMethod):
    """Low-rank updates of linear maps that share one budget of ranks, given to the maps where they matter most.

    Attaching leaves the output unchanged: E starts at zero. Trainable parameters: initial_rank·(in + out + 1) per
    module, plus those selected by `bias` and `modules_to_save`. Call :meth:`after_step` after each optimizer step,
    before the gradients are cleared, and add the side paths' penalty to the loss. ``byway train`` does both,
    transformers' Trainer neither.

    Raises:
        ConfigError: a value out of range, or a run too short for the schedule.
        TargetError: something named is not in the model, or is not a linear map.
    """

    rank: Rank = 8
    """Average rank of a module at the end of training."""
    initial_rank: Rank = 12
    """r₀: rank of every module at the start."""
    alpha: Positive = 16.0
    """The update is scaled by alpha/(initial_rank + 1e-5), also after ranks have been removed."""
    dropout: Dropout = 0.0
    """Dropout probability on the input of the update."""
    targets: str | Sequence[str] | None = None
    """Linear maps to adapt: ``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list
    of names; null: chosen by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""
    initial_steps: Steps = 0.1
    """Steps before the first rank is removed; below 1: a fraction of the run."""
    final_steps: Steps = 0.3
    """Steps at the end of the run in which ranks no longer change; below 1: a fraction of the run."""
    interval: Count = 1
    """Steps between two reallocations of the ranks."""
    beta1: Decay = 0.85
    """Decay of the moving average of the importance."""
    beta2: Decay = 0.85
    """Decay of the moving average of its uncertainty."""
    orthogonality: NotNegative = 0.1
    """γ: weight of the penalty that keeps the rows of A and the columns of B orthonormal."""
    bias: TrainedBiases = "none"
    """Biases of the base to train as well, as copies: none, all, or (``lora_only``) those of the adapted modules."""
    rank_pattern: Mapping[str, Annotated[int, Ge(0), Le(65_536)]] | None = None
    """Ranks that are left, by module path; set when a trained adapter is loaded, not meant to be written by hand."""

    peft = _AdaLoRAPeftFormat("ADALORA")
    mergeable: ClassVar[bool] = True
    rank_name: ClassVar[str] = "initial rank"

    def contradictions(self) -> list[str]:
        problems = []
        if self.rank > self.initial_rank:
            problems.append(f"rank is {self.rank} and initial_rank only {self.initial_rank}, but ranks are never added")
        if all(0 < s < 1 for s in (self.initial_steps, self.final_steps)) and self.initial_steps + self.final_steps >= 1:
            problems.append("initial_steps and final_steps cover the whole run; no steps are left to remove ranks in")
        if any(r > self.initial_rank for r in (self.rank_pattern or {}).values()):
            problems.append(f"rank_pattern has a rank above initial_rank, {self.initial_rank}: {dict(self.rank_pattern or {})!r}")
        return problems

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        patterns = {"rank_pattern": self.rank_pattern or {}}
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, patterns=patterns, notes=notes)
        if self.bias == "all":
            notes.extend(untrained_biases(model))
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
        if not is_linear(site.module):
            raise TargetError(f"{site.path} is a {type(site.module).__name__}; AdaLoRA adapts linear maps only", "exclude it")
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
        yield from trained_biases(model, self.bias, planned, context)

    def schedule(self, total: int) -> Schedule:
        """Return the schedule of the budget for a run of `total` steps.

        Raises:
            ConfigError: no steps are left between `initial_steps` and `final_steps`.
        """
        initial, final = (int(s * total) if s < 1 else int(s) for s in (self.initial_steps, self.final_steps))
        if initial + final >= total:
            raise ConfigError(
                f"the run has {total} steps, of which initial_steps and final_steps take {initial} + {final}: no ranks could be removed",
                "make them smaller, or train longer",
            )
        return Schedule(initial, final, self.interval, total)

    def after_step(self, adapter: Attached, step: int, total: int) -> None:
        sides = [side for _, side in adapter.side_paths() if isinstance(side, AdaptiveRank)]
        allocate(sides, self.schedule(total), step, target=self.rank * len(sides), betas=(self.beta1, self.beta2))
