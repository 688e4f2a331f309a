"""HF peft's LoraConfig: the fields that LoRA and DoRA share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from byway.core.families.names import renamed_on_loading, taken_for_experts
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site
from byway.errors import ConfigError, listed
from byway.methods.lowrank.initialization import Init
from byway.methods.lowrank.method import LowRankMethod
from byway.methods.lowrank.sides import LowRank

__all__ = ["LowRankPeftFormat"]

M = TypeVar("M", bound=LowRankMethod)

_OTHER_VARIANTS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters",
    "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Fields, besides ``use_dora``, that change what the tensors mean."""

_INITIALIZATIONS: Mapping[Any, Init] = {
    "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
"""peft's named initializations that keep the base, or change it in a way that can be recomputed from its weights."""


class LowRankPeftFormat(PeftFormat[M]):
    """The peft_type LORA."""

    def declines(self, method: M, model: nn.Module, installed: Sequence[tuple[Site, SidePath]]) -> str:
        """Return why peft cannot hold it: it takes some linear maps for experts, or for others."""
        paths = [site.path for site, side in installed if isinstance(side, LowRank)]
        if taken := taken_for_experts(model, paths):
            return f"HF peft takes {listed(taken, 4)} for experts, as they were in transformers 4 (leave them out for a peft file)"
        if lost := renamed_on_loading(model, paths):
            return f"HF peft takes {listed(lost, 4)} for older names of other modules (leave them out for a peft file)"
        return ""

    def fields(self, method: M) -> dict[str, Any]:
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "bias": method.bias,
            "use_rslora": method.rank_stabilized,
            "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
            "rank_pattern": dict(method.rank_pattern or {}),
            "alpha_pattern": dict(method.alpha_pattern or {}),
            "trainable_token_indices": _plain(method.trained_tokens) or None,
        }

    def method(self, kind: type[M], config: Mapping[str, Any]) -> M:
        """Build the method; refuse variants whose tensors mean something else."""
        variants = [k for k in _OTHER_VARIANTS if config.get(k)]
        if variants:
            raise ConfigError(f"this adapter is not a plain {kind.__name__}: {', '.join(variants)} is set", "merge it with HF peft first")
        init = config.get("init_lora_weights", True)
        init = init.lower() if isinstance(init, str) else init  # as peft reads it
        if isinstance(init, str) and init not in _INITIALIZATIONS:
            raise ConfigError(
                f"peft changed the base at initialization (init_lora_weights: {init}), and that change cannot be recomputed",
                "convert it to an ordinary LoRA: save it with peft's path_initial_model_for_weight_conversion",
            )
        return kind(
            init=_INITIALIZATIONS.get(init, "kaiming"),
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=config.get("target_modules"),
            rank_pattern=config.get("rank_pattern") or None,
            alpha_pattern=config.get("alpha_pattern") or None,
            bias=config.get("bias", "none"),
            rank_stabilized=bool(config.get("use_rslora", False)),
            trained_tokens=config.get("trainable_token_indices") or (),
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )


def _plain(tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> list[int] | dict[str, list[int]]:
    return {name: list(ids) for name, ids in tokens.items()} if isinstance(tokens, Mapping) else list(tokens)
