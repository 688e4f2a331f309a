"""HF peft's PrefixTuningConfig: one prefix, stored as past keys and values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from byway.core.families import attention_windows, facts
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site, base_modules
from byway.methods.prefix.method import PrefixMethod, relative_bias_table
from byway.methods.prefix.sides import CROSS, Prefix, groups
from byway.methods.virtual.peft import token_count

__all__ = ["PrefixPeftFormat"]

_CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""peft's task types whose prefixes are read as P-tuning v2."""
_OURS, _THEIRS = "base_model.model.", "base_model."


class PrefixPeftFormat(PeftFormat[PrefixMethod]):
    """The peft_type PREFIX_TUNING of both prefix methods, which compute the same.

    A prefix with a classification head is read as P-tuning v2 (`classifying`), any other as prefix tuning.
    """

    def __init__(self, *, classifying: bool) -> None:
        super().__init__("PREFIX_TUNING")
        self.classifying = classifying

    def reads(self, config: Mapping[str, Any]) -> bool:
        return super().reads(config) and (config.get("task_type") in _CLASSIFYING) == self.classifying

    def declines(self, method: PrefixMethod, model: nn.Module, installed: Sequence[tuple[Site, SidePath]]) -> str:
        """Return why peft cannot hold it.

        peft has one prefix, of the same size in every layer, in the cache; in an encoder-decoder only for the decoder.
        """
        found = groups(model, method.attentions)
        if len(found) > 1:
            return f"HF peft stores one prefix, and this adapter has {len(found)}: {', '.join(found)}"
        ((name, places),) = found.items()
        if len({(place.heads, place.key_size, place.value_size) for place in places}) > 1 or places[0].key_size != places[0].value_size:
            return "HF peft's prefix needs the same size for all keys and values"
        if name == CROSS or (facts(model).kind == "encoder-decoder" and name != "decoder"):
            return f"HF peft adds a prefix only to the decoder's self-attention, not to {name}"
        if not _takes_cache(model):
            return f"HF peft passes a prefix as a cache, which {type(model).__name__} does not accept"
        if method.relative_bias == "none" and relative_bias_table(model, places) is not None:
            return "HF peft adds the relative position bias to the prefix (relative_bias: earlier)"
        if (method.pairs == "interleaved") != (facts(model).kind == "encoder-decoder"):
            return "HF peft reads the pairs in another order (pairs: interleaved) in encoder-decoders, and only there"
        if window := _hiding_window(model):
            return f"HF peft lets the attention window of {window:,} tokens hide the prefix from later tokens; here every token sees it"
        return ""

    def fields(self, method: PrefixMethod) -> dict[str, Any]:
        return {"num_virtual_tokens": method.num_virtual_tokens, "prefix_projection": False, "init_weights": None}

    def site_fields(self, method: PrefixMethod, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """Describe ``prompt_embeddings`` (P, 2·L·g·e): a row is (2L, g, e), keys and values of each layer in turn."""
        site, prefix = next((site, side) for site, side in installed if isinstance(side, Prefix))
        places = prefix.table(prefix.names[0]).places
        width = places[0].heads * places[0].key_size
        double = facts(site.module).kind == "encoder-decoder"
        return {
            "num_layers": len(places),
            "num_attention_heads": places[0].heads,
            "token_dim": width,
            "encoder_hidden_size": width,
            "num_transformer_submodules": 2 if double else 1,
        } | ({"task_type": "SEQ_2_SEQ_LM"} if double else {})

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop one ``model`` from the names of heads that were trained next to a prefix."""
        return {_THEIRS + name.removeprefix(_OURS) if name.startswith(_OURS) else name: t for name, t in tensors.items()}

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        tops = {path.partition(".")[0] for path, _ in base_modules(model) if path}
        return {
            _OURS + rest if (rest := name.removeprefix(_THEIRS)) != name and rest.partition(".")[0] in tops else name: t
            for name, t in tensors.items()
        }

    def method(self, kind: type[PrefixMethod], config: Mapping[str, Any]) -> PrefixMethod:
        """Build the method: keys and values (the MLP is folded), no dropout; in an encoder-decoder, the decoder's."""
        method = kind(
            num_virtual_tokens=token_count(config),
            hidden_size=None,
            dropout=0.0,
            init="zero" if config.get("init_weights") == "zero" else "normal",
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )
        if config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM":
            return replace(method, attentions=("decoder",), relative_bias="earlier", pairs="interleaved")
        return method


def _hiding_window(model: Any) -> int:
    """Return the width of the narrowest attention window that is shorter than the longest text; 0 if there is none."""
    values = model.config.get_text_config().to_dict()
    longest = values.get("max_position_embeddings") or values.get("n_positions") or math.inf
    return min((window for window in attention_windows(model) if window < longest), default=0)


def _takes_cache(model: nn.Module) -> bool:
    """True if a prefix can be passed to the model, or to its trunk, as a cache."""
    trunk = facts(model).trunk
    asked = [model] if trunk is None else [model, model.get_submodule(trunk)]
    return any("past_key_values" in inspect.signature(type(module).forward).parameters for module in asked)
