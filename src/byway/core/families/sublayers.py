"""Sub-layers: which module's output the residual stream receives, what is normalized after it, and where the residual comes from.

In every transformer block z = sub-layer(...) is added to the residual x. Post-norm blocks (BERT) go on with LN(x + z); in pre-norm blocks
(Llama) the sub-layer reads LN(x). A parallel block adds attention and feed-forward to the same x, so that neither has a sum of its own.

The site of z, first of what there is: the module named in the table below (mostly the dropout after the output map; a norm, a scale or a
map where z is not a sub-layer's whole output), else the whole attention or feed-forward module, else its output map. A dropout that is
called twice in a block (ViT, Phi) or as a function (Llama, OPT, BART) is no site: there z is taken before dropout.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from byway.core.families.facts import Facts, layer_index, locate
from byway.core.families.reading import facts
from byway.core.families.table import FAMILIES
from byway.core.slots import base_modules
from byway.core.weights import features, is_norm

__all__ = ["Role", "SubLayer", "layer_norms", "sublayers"]

Role = Literal["attention", "cross-attention", "feed-forward"]

_CROSS = re.compile(r"cross_?attention|encdec|encoder_attn", re.IGNORECASE)
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class SubLayer:
    """One attention or feed-forward part of one layer; all values are module paths."""

    role: Role
    layer: str
    output: str
    """The module whose (first) output is z."""
    map: str
    """A linear map whose outputs are as wide as z, and of the base's dtype."""
    norm: str | None = None
    """Post-norm blocks: the norm over x + z."""
    residual: str | None = None
    """Pre-norm blocks: the module whose first argument is x; None where z has no sum of its own (parallel blocks) or is scaled first."""
    entry: str | None = None
    """Feed-forward: the module whose first argument is what the feed-forward reads; the whole part where it is one, else its first map."""
    whole: bool = False
    """Feed-forward: whether `entry` is the whole part, so that it answers what the part does."""

    def width(self, modules: Mapping[str, nn.Module]) -> int:
        """d: how wide z is."""
        return features(modules[self.map])[1]


@dataclass(frozen=True)
class _Row:
    """Names below a layer (below `container` where that is set), by role."""

    output: Mapping[str, str] = field(default_factory=dict)
    norm: Mapping[str, str] = field(default_factory=dict)
    """The norm over x + z in post-norm blocks; in pre-norm blocks what reads x."""
    post: bool | str = False
    """Whether the blocks are post-norm; a configuration field that says so, with ``!`` one that says the opposite."""
    unless: str = ""
    """A configuration field that, when set, makes the residual something else than the input of the norm."""
    container: str = ""


def _roles(attention: str, feed_forward: str, cross: str = "") -> dict[str, str]:
    return {"attention": attention, "feed-forward": feed_forward} | ({"cross-attention": cross} if cross else {})


_LLAMA = _Row(norm=_roles("input_layernorm", "post_attention_layernorm"))
_SANDWICH = _Row(_roles("post_attention_layernorm", "post_feedforward_layernorm"), _roles("input_layernorm", "pre_feedforward_layernorm"))
_GPT2 = _Row(_roles("attn.resid_dropout", "mlp.dropout"), _roles("ln_1", "ln_2"))
_BERT = _Row(_roles("attention.output.dropout", "output.dropout"), _roles("attention.output.LayerNorm", "output.LayerNorm"), post=True)
_BART = _Row(norm=_roles("self_attn_layer_norm", "final_layer_norm", "encoder_attn_layer_norm"), post=True)
_T5 = _Row(_roles("dropout", "dropout", "dropout"), _roles("layer_norm", "layer_norm", "layer_norm"), container="layer.*")
_WAV2VEC2 = _Row(_roles("dropout", "feed_forward"), _roles("layer_norm", "final_layer_norm"), post="!do_stable_layer_norm")
_VIT = _Row(norm=_roles("layernorm_before", "layernorm_after"))
_CLIP = _Row(norm=_roles("layer_norm1", "layer_norm2"))

_ROWS: Mapping[str, _Row] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3", "cohere", "cohere2", "nemotron", "starcoder2", "glm",
                "phi", "mixtral", "olmoe", "gpt_oss", "qwen2_moe", "qwen3_moe", "deepseek_v3",
            ),
            _LLAMA,
        ),
        "gemma2": _SANDWICH,
        "gemma3_text": _SANDWICH,
        "olmo2": replace(_SANDWICH, norm=_roles("self_attn", "mlp")),
        "glm4": replace(_LLAMA, output=_roles("post_self_attn_layernorm", "post_mlp_layernorm")),
        "granite": _Row(),  # z is scaled on its way
        "stablelm": replace(_LLAMA, output={"feed-forward": "dropout"}),
        "phi3": replace(_LLAMA, output=_roles("resid_attn_dropout", "resid_mlp_dropout")),
        "gpt2": _GPT2,
        "gpt_bigcode": _GPT2,
        "gptj": _GPT2,
        "codegen": _GPT2,
        "gpt_neo": replace(_GPT2, output=_roles("attn.attention.resid_dropout", "mlp.dropout")),
        "gpt_neox": replace(_LLAMA, output=_roles("post_attention_dropout", "post_mlp_dropout")),
        "bloom": replace(
            _LLAMA,  # its sub-layers add the residual themselves
            output=_roles("self_attention.dense", "mlp.dense_4h_to_h"),
            unless="apply_residual_connection_post_layernorm",
        ),
        "falcon": _LLAMA,
        "mpt": _Row(_roles("resid_attn_dropout", "ffn.down_proj"), _roles("norm_1", "norm_2")),
        "opt": replace(_BART, post="!do_layer_norm_before"),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT),
        "mpnet": _Row(
            _roles("attention.dropout", "output.dropout"), _roles("attention.LayerNorm", "output.LayerNorm"), post=True
        ),
        "distilbert": _Row(norm=_roles("sa_layer_norm", "output_layer_norm"), post=True),
        "albert": _Row(
            _roles("attention.output_dropout", "ffn_output"), _roles("attention.LayerNorm", "full_layer_layer_norm"), post=True
        ),
        "modernbert": _Row({"attention": "attn.out_drop"}, _roles("attn_norm", "mlp_norm")),
        "wav2vec2": _WAV2VEC2,
        "hubert": _WAV2VEC2,
        "t5": _T5,
        "mt5": _T5,
        "bart": _BART,
        "marian": _BART,
        **dict.fromkeys(("mbart", "pegasus", "blenderbot", "whisper"), replace(_BART, post=False)),
        "vit": _VIT,
        "deit": _VIT,
        "beit": _Row(),  # z is scaled on its way
        "dinov2": _Row(_roles("layer_scale1", "layer_scale2"), _roles("norm1", "norm2")),
        "swin": replace(_VIT, output={"attention": "drop_path"}),  # attention answers in windows, drop_path has them undone
        **dict.fromkeys(
            ("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"), _CLIP
        ),
    }
)  # fmt: skip
"""``config.model_type`` -> what its facts do not say. Checked on tiny models: what is listed is what gets added to the residual."""


def sublayers(model: nn.Module) -> tuple[SubLayer, ...]:
    """The sub-layers of `model` in module order.

    A family that is not in the table: the feed-forward module or the output maps, with neither `norm` nor `residual`.

    Raises:
        TargetError: its layers, or the maps through which they write to the residual stream, cannot be told.
    """
    known = facts(model)
    modules = dict(base_modules(model))
    layers = layer_index(known.require("stacks"))
    attentions = _by_layer(known.require("attention_outputs"), layers)
    maps = _by_layer(known.feed_forward_outputs, layers)
    if not known.feed_forward_modules:
        known.require("feed_forward_outputs")
    wholes = _by_layer(known.feed_forward_modules, layers)
    entries = _by_layer(known.feed_forward_linears, layers)
    owners = _owners(modules)
    found: list[SubLayer] = []
    for layer in layers:
        row, config = _row(layer, owners)
        for path in attentions.get(layer, ()):
            found.append(_attention(known, row, config, layer, path, modules))
        like = (maps.get(layer) or attentions.get(layer) or (None,))[-1]
        whole = wholes.get(layer, (None,))[0]
        site = whole or (maps.get(layer) or (None,))[-1]
        if site is not None and like is not None:
            entry = whole or entries[layer][0]
            made = _make("feed-forward", known, row, config, layer, site, like, modules)
            found.append(replace(made, entry=entry, whole=whole is not None))
    order = {path: position for position, path in enumerate(modules)}
    return tuple(sorted(found, key=lambda part: order[part.output]))


def _by_layer(paths: tuple[str, ...], layers: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    where = {place: layer for layer, place in layers.items()}
    for path in paths:
        place = locate(path, layers)
        if place is not None:
            found.setdefault(where[place], []).append(path)
    return found


def _owners(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Path -> configuration, of every transformers model inside that the table knows."""
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None:
        return {}
    models: dict[str, Any] = {path: module for path, module in modules.items() if isinstance(module, utils.PreTrainedModel)}
    return {path: module.config for path, module in models.items() if module.config.model_type in FAMILIES}


def _row(layer: str, owners: Mapping[str, Any]) -> tuple[_Row | None, Mapping[str, Any]]:
    above = [path for path in owners if not path or layer.startswith(f"{path}.")]
    if not above:
        return None, {}
    config = owners[max(above, key=len)]
    return _ROWS.get(config.model_type), config.to_dict()


def _attention(
    known: Facts, row: _Row | None, config: Mapping[str, Any], layer: str, path: str, modules: Mapping[str, nn.Module]
) -> SubLayer:
    role: Role = "cross-attention" if _CROSS.search(path[len(layer) :]) else "attention"
    whole = [module for module in known.attention_modules if path.startswith(f"{module}.")]
    return _make(role, known, row, config, layer, whole[0] if whole and row is not None else path, path, modules)


def _make(
    role: Role,
    known: Facts,
    row: _Row | None,
    config: Mapping[str, Any],
    layer: str,
    site: str,
    like: str,
    modules: Mapping[str, nn.Module],
) -> SubLayer:
    if row is None:
        return SubLayer(role=role, layer=layer, output=site, map=like)
    home = _home(row, layer, like)
    output = _there(home, row.output.get(role), modules) or site
    norm = _there(home, row.norm.get(role), modules)
    if norm is None:
        return SubLayer(role=role, layer=layer, output=output, map=like)
    if _post(row, config):
        return SubLayer(role=role, layer=layer, output=output, map=like, norm=norm)
    own_sum = not known.parallel_blocks and not (row.unless and config.get(row.unless))
    return SubLayer(role=role, layer=layer, output=output, map=like, residual=norm if own_sum else None)


def _there(home: str, name: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    path = f"{home}.{name}"
    return path if name is not None and path in modules else None


def _home(row: _Row, layer: str, path: str) -> str:
    """What the row's names lie below: the layer, or the part of it that holds this sub-layer."""
    if not row.container:
        return layer
    depth = layer.count(".") + 1 + row.container.count(".") + 1
    return ".".join(path.split(".")[:depth])


def _post(row: _Row, config: Mapping[str, Any]) -> bool:
    if isinstance(row.post, bool):
        return row.post
    return bool(config.get(row.post.removeprefix("!"))) != row.post.startswith("!")


def layer_norms(model: nn.Module) -> tuple[str, ...]:
    """Every layer norm (RMS norms too) that has numbers of its own to train, in module order."""
    return tuple(path for path, module in base_modules(model) if is_norm(module) and not isinstance(module, _OTHER_NORMS))
