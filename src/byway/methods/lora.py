r"""LoRA: y = Wx + s·B(A(drop(x))), s = alpha/rank (alpha/√rank if rank-stabilized).

::

    x ──┬──── W (frozen) ─────────(+)── y        A (r, in)    B (out, r)
        └─ drop ── A ── B ── ·s ───┘             ΔW = s·B·A   (out, in)

Source: Hu et al., arXiv 2106.09685 §4.1; rank-stabilized scale: Kalajdzievski, arXiv 2312.03732; LoRA+: Hayou et al.,
arXiv 2402.12354; PiSSA: Meng et al., arXiv 2404.02948; OLoRA: Büyükakyüz, arXiv 2406.01775; EVA: Paischer et al., arXiv
2410.07170.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from byway.core.method import BuildContext
from byway.core.slots import Site
from byway.errors import TargetError
from byway.methods.lowrank.initialization import block_factors
from byway.methods.lowrank.method import LowRankMethod
from byway.methods.lowrank.peft import LowRankPeftFormat
from byway.methods.lowrank.sides import BlockLoRA, ConvLoRA, EmbeddingLoRA, LinearLoRA, LowRank

__all__ = ["LoRA"]


class _LoRAPeftFormat(LowRankPeftFormat["LoRA"]):
    def fields(self, method: LoRA) -> dict[str, Any]:
        return super().fields(method) | {"lora_bias": method.lora_bias}

    def reads(self, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and not config.get("use_dora")

    def method(self, kind: type[LoRA], config: Mapping[str, Any]) -> LoRA:
        return replace(super().method(kind, config), lora_bias=bool(config.get("lora_bias", False)))


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    """A low-rank update next to linear maps, embeddings and convolutions.

    Attaching leaves the output unchanged: B starts at zero (A in an embedding), and the initial BA of PiSSA and OLoRA
    is subtracted. Trainable parameters: rank·(in + out) per module, plus those selected by `bias`, `lora_bias`,
    `modules_to_save` and `trained_tokens`.

    Raises:
        ConfigError: a value out of range; ``eva`` without calibration batches.
        TargetError: something named is not in the model, or cannot take a low-rank update.
    """

    lora_bias: bool = False
    """Give B a trainable bias."""
    blocks: Sequence[bool] | None = None
    """For fused maps (GPT-2's ``c_attn``): which of the equal output blocks to adapt, each with its own rank-r pair A,
    B; null: the whole map with one pair."""

    peft = _LoRAPeftFormat("LORA")

    def contradictions(self) -> list[str]:
        problems: list[str] = []
        if self.blocks is not None and not any(self.blocks):
            problems.append(f"blocks is {list(self.blocks)!r}; at least one of them must be true")
        if self.blocks is not None and self.init != "kaiming":
            problems.append(f"blocks and init: {self.init} do not go together; only init: kaiming works with blocks")
        if self.blocks is not None and self.lora_bias:
            problems.append("blocks and lora_bias do not go together; B has no bias with blocks")
        return problems

    def _side(self, site: Site, rank: int, alpha: float, context: BuildContext) -> LowRank:
        if self.blocks is None:
            return super()._side(site, rank, alpha, context)
        a, b = block_factors(site, rank, self.blocks, context.generator)
        options: dict[str, Any] = {"alpha": alpha, "rank_stabilized": self.rank_stabilized, "dropout": self.dropout}
        return BlockLoRA(site.module, a, b, blocks=tuple(self.blocks), **options)

    def side(self, site: Site, a: Tensor, b: Tensor, options: dict[str, Any]) -> LowRank:
        module, options = site.module, options | {"bias": self.lora_bias}
        if isinstance(module, nn.Embedding):
            if self.lora_bias:
                raise TargetError(f"{site.path} is an embedding, where lora_bias is not possible", "exclude it, or leave lora_bias out")
            return EmbeddingLoRA(module, a, b, **options)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return ConvLoRA(module, a, b, **options)
        return LinearLoRA(module, a, b, **options)
