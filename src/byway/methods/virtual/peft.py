"""HF peft's prompt-learning configurations: what prompt tuning and P-tuning share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site
from byway.errors import AdapterError
from byway.methods.virtual.method import VirtualTokenMethod, trunk_of
from byway.methods.virtual.sides import EncoderStates, VirtualTokens

__all__ = ["VirtualTokenPeftFormat", "token_count"]

M = TypeVar("M", bound=VirtualTokenMethod)

_OURS, _THEIRS, _PROMPT = "base_model.model.", "base_model.", "prompt_embeddings"


class VirtualTokenPeftFormat(PeftFormat[M]):
    """The file holds the vectors, (P, d), under ``prompt_embeddings``."""

    def declines(self, method: M, model: nn.Module, installed: Sequence[tuple[Site, SidePath]]) -> str:
        """Return why peft cannot hold it: peft inserts virtual tokens before the first token, and has no templates."""
        if not method.parsed.is_plain:
            return "HF peft has no templates"
        if method.place(model, trunk_of(model).module).after_first:
            return "HF peft inserts virtual tokens before [CLS] and pools the first of them (placement: first)"
        return ""

    def fields(self, method: M) -> dict[str, Any]:
        return {"num_virtual_tokens": method.parsed.count}

    def site_fields(self, method: M, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        site, side = next((site, side) for site, side in installed if isinstance(side, VirtualTokens))
        trunk: Any = site.module
        double = any(isinstance(other, EncoderStates) for _, other in installed)
        return {
            "token_dim": side.export()[_PROMPT].shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": trunk.config.num_attention_heads,
            "num_layers": trunk.config.num_hidden_layers,
        } | ({"task_type": "SEQ_2_SEQ_LM"} if double and config["task_type"] is None else {})

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the prefix of the prompt's name, and one ``model`` from those of heads."""
        return {
            _PROMPT if name == _PROMPT or name.endswith(f".{_PROMPT}") else _THEIRS + name.removeprefix(_OURS): tensor
            for name, tensor in tensors.items()
        }

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Restore the names; of peft's rows for encoder and decoder, read the first half, which is all that peft
        uses."""
        trunk = trunk_of(model).path
        found = {}
        for name, tensor in tensors.items():
            if name == _PROMPT:
                count = config.get("num_virtual_tokens")
                halves = config.get("num_transformer_submodules") == 2 and isinstance(count, int) and tensor.shape[0] == 2 * count
                found[f"{_OURS}{trunk}.{_PROMPT}" if trunk else _PROMPT] = tensor[:count].clone() if halves else tensor
            else:
                found[_OURS + name.removeprefix(_THEIRS) if name.startswith(_THEIRS) else name] = tensor
        return found

    def method(self, kind: type[M], config: Mapping[str, Any]) -> M:
        """Build the method; how the vectors were initialized no longer matters."""
        saved = tuple(config.get("modules_to_save") or ()) or "none"
        return kind(num_virtual_tokens=token_count(config), placement="first", modules_to_save=saved)


def token_count(config: Mapping[str, Any]) -> int:
    """Return ``num_virtual_tokens`` of a peft configuration; AdapterError if it is not an integer ≥ 1."""
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise AdapterError(f"num_virtual_tokens is {count!r}; it must be an integer ≥ 1")
    return count
