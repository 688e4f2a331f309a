"""peft's ``LoraModel`` and its like: the module between a PeftModel and the user's model.

The operators that combine adapters are in :mod:`byway.workshop.combine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from byway.compat.peft.config import AdaLoraConfig, LoraConfig
from byway.compat.peft.layers import layer_of
from byway.compat.peft.session import Session
from byway.core.adapter import adapters
from byway.core.copies import TrainedCopy
from byway.core.slots import penalties, side_paths, slots
from byway.errors import AdapterError, listed
from byway.methods.lowrank.sides import LowRank
from byway.workshop.combine import OPERATORS, combine, low_rank_of, root

__all__ = ["Tuner"]

_PREFIXES = {"LORA": "lora_", "ADALORA": "lora_", "IA3": "ia3_", "LN_TUNING": "ln_tuning_"}
"""peft_type → how the names of the method's tensors begin."""


class Tuner(Session):
    """The session as a module that runs the model."""

    @property
    def prefix(self) -> str:
        """How the names of this method's tensors begin."""
        first = next(iter(self.peft_config.values()), None)
        return "lora_" if first is None else _PREFIXES[str(first.peft_type)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; AdaLoRA's penalty is added to a loss that it returns, as in peft."""
        out = self.model(*args, **kwargs)
        if isinstance(out, dict) and out.get("loss") is not None and (penalty := penalties(self.model)) is not None:
            out["loss"] = out["loss"] + penalty
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """Allocate AdaLoRA's ranks after step `global_step` (from 1), before the gradients are cleared."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            if isinstance(config, AdaLoraConfig) and config.total_step is not None:
                adapter = adapters(self.model)[name]
                adapter.method.after_step(adapter, global_step, config.total_step)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Any = "total",
    ) -> None:
        """Combine adapters into a new, frozen one.

        combination_type: ``cat`` (exact), ``svd``, ``linear``, ``ties``, ``dare_linear``, ``dare_ties``,
            ``magnitude_prune``, or one of the last four with ``_svd``, on the updates instead of the factors.
            (IA)³ vectors are summed with their weights.

        Raises:
            AdapterError: ranks differ where they must not, the type is unknown, or two adapters train a module whole.
        """
        if adapter_name in self.peft_config:
            return
        for name in adapters:
            self.check_adapter(name)
        if len(adapters) != len(weights) or not adapters:
            raise AdapterError(f"there are {len(adapters)} adapters and {len(weights)} weights")
        kinds = {str(self.peft_config[name].peft_type) for name in adapters}
        if len(kinds) > 1 or kinds - {"LORA", "IA3"}:
            raise AdapterError(f"adapters of the types {listed(kinds)} cannot be combined")
        copied = [
            [own for own, side in slot.sides() if own in adapters and isinstance(side, TrainedCopy)] for _, _, slot in slots(self.model)
        ]
        if shared := sum(len(names) > 1 for names in copied):
            raise AdapterError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save, but found {shared} such instance(s)."
            )
        kind = "linear" if len(adapters) == 1 else combination_type
        if kinds == {"IA3"}:
            self.attach_config(deepcopy(self.peft_config[adapters[0]]), adapter_name)
        else:
            self._attach_empty(adapters, adapter_name, self._combined_rank(adapters, kind, svd_rank))
        options = {"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver}
        with torch.no_grad():
            for _, module, slot in slots(self.model):
                sides = dict(slot.sides())
                own = [(sides[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in sides]
                target = sides.get(adapter_name)
                if kinds == {"IA3"} and target is not None:
                    for key, parameter in target.named_parameters():
                        parameter.copy_(torch.stack([side.get_parameter(key) * weight for side, weight in own]).sum(0))
                elif isinstance(target, LowRank):
                    low_rank = [(side, weight) for side, weight in own if isinstance(side, LowRank)]
                    a, b = _combined(target, low_rank, kind, density, majority_sign_method, options)
                    target.lora_A.zero_()[: a.shape[0]].copy_(a)
                    target.lora_B.zero_()[:, : b.shape[1]].copy_(b)
                    target.scale = layer_of(module).scales[adapter_name] = 1.0
        self.set_requires_grad(adapter_name, False)

    def _combined_rank(self, adapters: Sequence[str], kind: str, svd_rank: int | None) -> int:
        pairs = [(own, side.rank) for _, own, side in side_paths(self.model) if isinstance(side, LowRank)]
        ranks = [max((rank for own, rank in pairs if own == name), default=0) for name in adapters]
        if kind in OPERATORS:
            if len(set(ranks)) > 1:
                raise AdapterError(f"All adapters must have the same r value with combination_type={kind}; they have {ranks}")
            return ranks[0]
        if kind == "cat":
            return sum(ranks)
        if kind == "svd" or kind.removesuffix("_svd") in OPERATORS.keys() - {"linear"}:
            return svd_rank or max(ranks)
        raise AdapterError(f"Invalid combination_type: {kind}", f"there are: {listed([*OPERATORS, 'cat', 'svd'])}, and most with _svd")

    def _attach_empty(self, names: Sequence[str], adapter_name: str, rank: int) -> None:
        """Attach a LoRA of `rank` to every module that one of `names` adapts; copy modules that they train whole."""
        there = [(site.path, side) for site, own, side in side_paths(self.model) if own in names]
        copies = {path: side for path, side in there if isinstance(side, TrainedCopy)}
        configs = [self.peft_config[name] for name in names]
        assert isinstance(configs[0], LoraConfig)
        config = replace(
            configs[0],
            r=rank,
            lora_alpha=rank,
            use_rslora=False,
            init_lora_weights=True,
            target_modules=sorted({path for path, side in there if isinstance(side, LowRank)}),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=sorted(copies) or None,
            alpha_pattern={},
            rank_pattern={},
        )
        self.attach_config(config, adapter_name)
        written = [vars(other).get("target_modules") for other in configs]
        if all(isinstance(targets, set) for targets in written):
            config.target_modules = {target for targets in written if targets for target in targets}
        for site, own, side in side_paths(self.model):
            if own == adapter_name and isinstance(side, TrainedCopy) and site.path in copies:
                side.copy.load_state_dict(copies[site.path].copy.state_dict())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def _combined(
    target: LowRank, own: Sequence[tuple[LowRank, float]], kind: str, density: float | None, sign: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return A and B of the combination of weighted low-rank side paths of one module, for a scale of 1."""
    if not own:
        raise AdapterError("No matching LoRAs found.")
    factors = [side.lora_A.detach() for side, _ in own], [side.lora_B.detach() for side, _ in own]
    shares = [weight * side.scale for side, weight in own]
    if kind == "cat":
        return torch.cat([a * share for a, share in zip(factors[0], shares, strict=True)]), torch.cat(factors[1], dim=1)
    if kind in OPERATORS:
        signed = [root(share) * (1 if share >= 0 else -1) for share in shares]
        a = combine(kind, factors[0], signed, density=density, sign=sign)
        return a, combine(kind, factors[1], [root(share) for share in shares], density=density, sign=sign)
    operator = "linear" if kind == "svd" else kind.removesuffix("_svd")
    delta = combine(operator, [side.product() for side, _ in own], [weight for _, weight in own], density=density, sign=sign)
    a, b = low_rank_of(delta, target.rank, **options)
    return a.reshape(target.lora_A.shape), b.reshape(target.lora_B.shape)
