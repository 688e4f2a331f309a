"""Combine adapters into a new one by weight (peft's ``add_weighted_adapter``).

Legend: s_i, A_i, B_i are scale and factors of adapter i in one module, w_i its weight. PiSSA and OLoRA count as the
plain LoRA of rank 2r that their files hold. Everything is computed before the new adapter is attached, so an error
leaves the model as it was.

What is not a low-rank product is combined as Σ w_i (t_i − t) around the base's t: trained tokens, a module trained
whole, ``lora_bias`` (t = 0). DoRA's magnitudes do not add up: a DoRA adapter can only be copied, alone and with
weight 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.config import IA3Config, LoraConfig, PeftConfig
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath, base_modules, side_paths
from byway.core.token_rows import TrainedRows
from byway.errors import AdapterError, listed
from byway.formats.peft.config import write_targets
from byway.methods.ia3 import InputScale
from byway.methods.lowrank.magnitude import Decomposed
from byway.methods.lowrank.sides import LowRank
from byway.workshop.combine import OPERATORS, combine, low_rank_of

__all__ = ["Combination"]

_SUMS = ("cat", "svd", "linear")
"""Combination types that add updates up, so that what has no factors can be added up as well."""


@dataclass(kw_only=True)
class Combination:
    """Which adapters are combined, how, and the tensors that come out."""

    model: nn.Module
    configs: Mapping[str, PeftConfig]
    """The adapters to combine, by name."""
    weights: Sequence[float]
    kind: str
    svd_rank: int | None = None
    density: float | None = None
    sign: Any = "total"
    svd: Mapping[str, Any] = field(default_factory=dict)
    """Options of :func:`low_rank_of`."""
    rank: int = 0
    """The rank of the new adapter."""

    def __post_init__(self) -> None:
        self.names = list(self.configs)
        if len(self.names) != len(self.weights) or not self.names:
            raise AdapterError(f"there are {len(self.names)} adapters and {len(self.weights)} weights")
        kinds = {str(config.peft_type) for config in self.configs.values()}
        if len(kinds) > 1 or kinds - {"LORA", "IA3"}:
            raise AdapterError(f"adapters of the types {listed(sorted(kinds))} cannot be combined")
        self.kind = "linear" if len(self.names) == 1 else self.kind
        self.parts: dict[str, list[tuple[float, SidePath]]] = {}
        """Module path → (weight, side path) of the adapters to combine."""
        for site, name, side in side_paths(self.model):
            if name in self.names:
                self.parts.setdefault(site.path, []).append((self.weights[self.names.index(name)], side))
        self._check()
        if kinds == {"LORA"}:
            self.rank = self._rank()
        self.combined = {path: tensors for path, own in self.parts.items() if (tensors := self._combined(path, own))}
        """Module path → name of a tensor of the new side path → its value."""

    def _of(self, kind: type[Any]) -> dict[str, list[tuple[float, Any]]]:
        """Return module path → (weight, side path) for the side paths of one class."""
        found = {path: [(weight, side) for weight, side in own if isinstance(side, kind)] for path, own in self.parts.items()}
        return {path: own for path, own in found.items() if own}

    def _check(self) -> None:
        """Refuse what has no weighted sum."""
        if shared := sum(len(own) > 1 for own in self._of(TrainedCopy).values()):
            raise AdapterError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save, but found {shared} such instance(s)."
            )
        if self._of(Decomposed) and (len(self.names) > 1 or self.weights[0] != 1):
            raise AdapterError(
                f"add_weighted_adapter: the magnitudes of DoRA do not add up, so {listed(self.names)} cannot be combined by weight",
                "one DoRA adapter with weight 1 can be copied; merge_and_unload applies several one after the other",
            )
        apart = {
            "trainable_token_indices": self._of(TrainedRows),
            "modules_to_save": self._of(TrainedCopy),
            "lora_bias": [side for own in self._of(LowRank).values() for _, side in own if side.lora_bias is not None],
        }
        named = [name for name, own in apart.items() if own]
        if named and self.kind.removesuffix("_svd") not in _SUMS:
            raise AdapterError(
                f"combination_type={self.kind!r} is defined for low-rank factors only, and these adapters have {listed(named)}",
                f"combine them with {listed(_SUMS)}",
            )

    def _rank(self) -> int:
        """Return the rank of the new adapter."""
        low_rank = self._of(LowRank)
        ranks = [
            max((side.exported_rank for site, own, side in side_paths(self.model) if own == name and isinstance(side, LowRank)), default=0)
            for name in self.names
        ]
        if self.kind in OPERATORS:
            uneven = [path for path, own in low_rank.items() if len({side.exported_rank for _, side in own}) > 1]
            if len(set(ranks)) > 1 or uneven:
                where = f" (ranks also differ at {listed(uneven, 3)})" if uneven else ""
                raise AdapterError(f"All adapters must have the same r value with combination_type={self.kind}; they have {ranks}{where}")
            return ranks[0]
        if self.kind == "cat":
            return sum(ranks)
        if self.kind == "svd" or self.kind.removesuffix("_svd") in OPERATORS.keys() - {"linear"}:
            return self.svd_rank or max(ranks)
        there = f"there are: {listed([*OPERATORS, 'cat', 'svd'])}, and most with _svd"
        raise AdapterError(f"Invalid combination_type: {self.kind}", there)

    # ------------------------------------------------ tensors

    @torch.no_grad()
    def _combined(self, path: str, own: Sequence[tuple[float, SidePath]]) -> dict[str, Tensor]:
        """Return the tensors of the new side paths at `path`; ``{}`` for copies and tokens, which need the new ones."""
        low_rank = [(weight, side) for weight, side in own if isinstance(side, LowRank)]
        if low_rank:
            a, b = self._factors(low_rank)
            found = {"lora_A": a, "lora_B": b}
            biases = [weight * side.scale * side.lora_bias.detach() for weight, side in low_rank if side.lora_bias is not None]
            found |= {"lora_bias": torch.stack(biases).sum(0)} if biases else {}
            magnitudes = [side.magnitude.detach() for _, side in low_rank if isinstance(side, Decomposed)]
            return found | ({"magnitude": magnitudes[0]} if magnitudes else {})
        if isinstance(next(iter(self.configs.values())), IA3Config):
            vectors = [(weight, side) for weight, side in own if not isinstance(side, TrainedCopy)]
            if len({type(side) for _, side in vectors}) > 1:
                raise AdapterError(f"one adapter scales the inputs of {path} and another its outputs: they cannot be added up")
            names = [name for _, side in vectors[:1] for name, _ in side.named_parameters()]
            return {name: torch.stack([weight * side.get_parameter(name) for weight, side in vectors]).sum(0) for name in names}
        return {}

    def _factors(self, own: Sequence[tuple[float, LowRank]]) -> tuple[Tensor, Tensor]:
        """Return A and B of the combination of low-rank side paths of one module, for a scale of 1."""
        exported = [side.export() for _, side in own]
        factors = [[e[side.peft_names[name]].detach() for e, (_, side) in zip(exported, own, strict=True)] for name in ("lora_A", "lora_B")]
        shares = [weight * side.scale for weight, side in own]
        if self.kind == "cat":
            return torch.cat([a * share for a, share in zip(factors[0], shares, strict=True)]), torch.cat(factors[1], dim=1)
        if self.kind in OPERATORS:
            roots = [math.sqrt(abs(share)) for share in shares]  # scale both factors, to scale their product
            signed = [size if share >= 0 else -size for size, share in zip(roots, shares, strict=True)]
            a = combine(self.kind, factors[0], signed, density=self.density, sign=self.sign)
            return a, combine(self.kind, factors[1], roots, density=self.density, sign=self.sign)
        operator = "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")
        weights = [weight for weight, _ in own]
        delta = combine(operator, [side.product() for _, side in own], weights, density=self.density, sign=self.sign)
        a, b = low_rank_of(delta, self.rank, **self.svd)
        like_a, like_b = (group[0] for group in factors)
        return a.reshape(self.rank, *like_a.shape[1:]), b.reshape(like_b.shape[0], self.rank, *like_b.shape[2:])

    @torch.no_grad()
    def fill(self, name: str) -> None:
        """Write the combined tensors into the side paths of the attached adapter `name`."""
        for site, own, side in side_paths(self.model):
            if own != name:
                continue
            if isinstance(side, TrainedCopy):
                for key, tensor in side.copy.state_dict().items():
                    before = tensor.clone()
                    for weight, other in self._of(TrainedCopy).get(site.path, ()):
                        theirs = other.copy.state_dict()[key]
                        tensor.copy_(before + weight * (theirs - before) if tensor.is_floating_point() else theirs)
            elif isinstance(side, TrainedRows):
                before = side.rows.clone()
                for weight, other in self._of(TrainedRows).get(site.path, ()):
                    place = side.place[other.indices]
                    side.rows[place] += weight * (other.rows - before[place])
            else:
                found = self.combined.get(site.path, {})
                for key, parameter in side.named_parameters():
                    value = found.get(key, torch.zeros(()))
                    if key == "lora_A":
                        parameter.zero_()[: value.shape[0]].copy_(value)
                    elif key == "lora_B":
                        parameter.zero_()[:, : value.shape[1]].copy_(value)
                    else:
                        parameter.copy_(value)

    # ------------------------------------------------ the configuration

    def config(self) -> PeftConfig:
        """Return a configuration of the new adapter: a scale of 1, every module by its path."""
        configs = list(self.configs.values())
        copies = sorted(self._of(TrainedCopy)) or None
        if isinstance(configs[0], IA3Config):
            # by path: without names in the configuration, the method has chosen both
            inner = {path for path, own in self.parts.items() if any(isinstance(side, InputScale) for _, side in own)}
            scaled = {path for path, own in self.parts.items() if any(not isinstance(side, TrainedCopy) for _, side in own)}
            return replace(configs[0], target_modules=scaled, feedforward_modules=inner, exclude_modules=None, modules_to_save=copies)
        assert isinstance(configs[0], LoraConfig)
        lora = [config for config in configs if isinstance(config, LoraConfig)]
        rows = {path: sorted({i for _, side in own for i in side.indices.tolist()}) for path, own in self._of(TrainedRows).items()}
        tokens = [config.trainable_token_indices for config in lora]
        written = tokens[0] if all(own == tokens[0] for own in tokens) else rows
        return replace(
            lora[0],
            r=max(self.rank, 1),
            lora_alpha=max(self.rank, 1),
            use_rslora=False,
            lora_bias=any(config.lora_bias for config in lora),
            init_lora_weights=True,
            target_modules=sorted(self._of(LowRank)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=copies,
            trainable_token_indices=written or None,
            alpha_pattern={},
            rank_pattern={},
        )

    def shorten(self, config: PeftConfig) -> None:
        """Write the targets of the new adapter as the shortest names that select them."""
        if isinstance(config, LoraConfig) and (chosen := sorted(self._of(LowRank))):
            written = write_targets(chosen, [path for path, _ in base_modules(self.model) if path], list(config.modules_to_save or ()))
            config.target_modules, config.exclude_modules = set(written["target_modules"]), written["exclude_modules"]
