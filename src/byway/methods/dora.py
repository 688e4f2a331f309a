r"""DoRA: y = W'x + b, W' = (m/n)∘(W + s·BA), n = ‖W + s·BA‖ per output feature, and m trained, starting as ‖W‖.

::

    x ──┬──── W (frozen) ──┬───────────────(+)── y      A (r, in)    B (out, r)    m (out,)
        │                  └─ ·(m/n − 1) ───┤            V = W + s·B·A, W' = (m/n)∘V, both (out, in)
        └─ drop ── A ── B ── ·s ── ·(m/n) ──┘            n = ‖V‖ per row, a constant for the gradient

With dropout, both corrections use the dropped input, as in the authors' code. Source: Liu et al., arXiv 2402.09353 §4.
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
from byway.methods.lowrank.peft import LowRankPeftFormat
from byway.methods.lowrank.sides import LowRank

__all__ = ["DoRA"]


class _DoRAPeftFormat(LowRankPeftFormat["DoRA"]):
    def fields(self, method: DoRA) -> dict[str, Any]:
        return super().fields(method) | {"use_dora": True}

    def reads(self, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and bool(config.get("use_dora"))


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    """A low-rank update of the direction of each row of a weight, and a trained magnitude per row.

    Attaching leaves the output unchanged: the magnitudes start as the row norms of the weight. Trainable parameters:
    rank·(in + out) + out per module, plus those selected by `bias`, `modules_to_save` and `trained_tokens`.

    Raises:
        ConfigError: a value out of range; ``eva`` without calibration batches.
        TargetError: something named is not in the model, or cannot take this update.
    """

    peft = _DoRAPeftFormat("LORA")

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        for site in sites:
            _check_groups(site)

    def side(self, site: Site, a: Tensor, b: Tensor, options: dict[str, Any]) -> LowRank:
        module = site.module
        if isinstance(module, nn.Embedding):
            return EmbeddingDoRA(module, a, b, **options)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _check_groups(site)  # also when loading a file, which does not call check()
            return ConvDoRA(module, a, b, **options)
        return LinearDoRA(module, a, b, **options)


def _check_groups(site: Site) -> None:
    """Refuse a grouped convolution: the update mixes channels that the weight keeps apart, so it has no direction."""
    if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and site.module.groups > 1:
        raise TargetError(
            f"{site.path} is a convolution with {site.module.groups} groups, and DoRA's update mixes the channels of all groups",
            "exclude it, or use lora",
        )
