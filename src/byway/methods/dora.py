r"""DoRA: y = W'x + b, W' = (m/n)∘(W + s·BA), n = ‖W + s·BA‖ for each output feature, m trained from ‖W‖.

::

    x ──┬──── W (frozen) ──┬───────────────(+)── y      A (r, in)    B (out, r)    m (out,)
        │                  └─ ·(m/n − 1) ───┤            V = W + s·B·A, W' = (m/n)∘V, both (out, in)
        └─ drop ── A ── B ── ·s ── ·(m/n) ──┘            n = ‖V‖ per row, a constant for the gradient

With dropout both corrections see the dropped input, as in the authors' code. Source: Liu et al., arXiv 2402.09353 §4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from byway.core.slots import Site
from byway.errors import TargetError
from byway.methods.lowrank.magnitude import ConvDoRA, EmbeddingDoRA, LinearDoRA
from byway.methods.lowrank.method import LowRankMethod
from byway.methods.lowrank.sides import LowRank

__all__ = ["DoRA"]


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    """A low-rank update of the direction of each output feature's weights, and a trained length for each.

    Attaching leaves the output as it is: the lengths start as those of the weight. Trained: rank·(in + out) + out numbers a module, plus
    what `bias`, `modules_to_save` and `trained_tokens` name.

    Raises:
        ConfigError: a value out of range; ``eva`` without calibration batches.
        TargetError: something named is not in the model, or cannot take this update.
    """

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        for site in sites:
            _check_groups(site)

    def side(self, site: Site, a: Tensor, b: Tensor, options: dict[str, Any]) -> LowRank:
        module = site.module
        if isinstance(module, nn.Embedding):
            return EmbeddingDoRA(module, a, b, **options)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _check_groups(site)  # a file's sites as well
            return ConvDoRA(module, a, b, **options)
        return LinearDoRA(module, a, b, **options)

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"use_dora": True}

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        return super().reads_peft(config) and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> DoRA:
        """What a peft configuration with ``use_dora`` asks for; fields of further variants are refused by name."""
        return cls(**cls.from_config(config))


def _check_groups(site: Site) -> None:
    """Refuse a grouped convolution: the branch mixes channels that the weight keeps apart, so no row of the weight is its direction."""
    if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and site.module.groups > 1:
        raise TargetError(
            f"{site.path} is a convolution with {site.module.groups} groups: the update mixes all channels and has no length there",
            "exclude it, or use lora",
        )
