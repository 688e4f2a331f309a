"""Sub-layers: whose output is added to the residual stream, the norm of the sum, and the source of the residual.

In every transformer block the output z = sub-layer(...) is added to the residual x. Post-norm blocks (BERT) continue
with LN(x + z); in pre-norm blocks (Llama) the sub-layer reads LN(x). A parallel block adds attention and feed-forward
to the same x, so neither has a sum of its own.

The site of z is the first of these that exists: the module named in the table below (mostly the dropout after the
output map; a norm, a scale or a map if z is more than the sub-layer's output), the whole attention or feed-forward
module, its output map. A dropout that is called twice per block (ViT, Phi) or as a function (Llama, OPT, BART) cannot
be a site: there z is taken before dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from byway.core.families.attentions import is_cross_attention
from byway.core.families.detect import facts, pretrained_models
from byway.core.families.facts import inside, layer_above, layer_index
from byway.core.families.table import FAMILIES
from byway.core.slots import base_modules
from byway.core.weights import features, is_norm

__all__ = ["Role", "SubLayer", "layer_norms", "sublayers"]

Role = Literal["attention", "cross-attention", "feed-forward"]

_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class SubLayer:
    """One attention or feed-forward part of a layer. All fields but `role` and `whole` are module paths."""

    role: Role
    layer: str
    output: str
    """The module whose (first) output is z."""
    map: str
    """A linear map whose output has the width and dtype of z."""
    norm: str | None = None
    """Post-norm blocks: the norm over x + z."""
    residual: str | None = None
    """Pre-norm blocks: the module whose first argument is x; None if z has no sum of its own or is scaled first."""
    entry: str | None = None
    """Feed-forward: the module that reads its input: the whole part if that is a module, else its first map."""
    whole: bool = False
    """Feed-forward: True if `entry` is the whole part, so that its output is that of the part."""

    def width(self, modules: Mapping[str, nn.Module]) -> int:
        """Return d, the width of z."""
        return features(modules[self.map])[1]


@dataclass(frozen=True)
class _Row:
    """Module names below a layer (below `container` if it is set), by role."""

    output: Mapping[str, str] = field(default_factory=dict)
    norm: Mapping[str, str] = field(default_factory=dict)
    """In post-norm blocks the norm over x + z; in pre-norm blocks the module that reads x."""
    post: bool | str = False
    """True if post-norm; or the configuration field that says so, with ``!`` one that says the opposite."""
    unless: str = ""
    """A configuration field that, if set, makes the residual something else than the input of the norm."""
    container: str = ""
    """The part of the layer that holds the sub-layer, as a pattern: ``layer.*`` of T5."""

    def completed(self, part: SubLayer, config: Mapping[str, Any], modules: Mapping[str, nn.Module], *, parallel: bool) -> SubLayer:
        """Return `part` with the site, norm and residual that this row names."""
        home = part.layer
        if self.container:
            depth = home.count(".") + 1 + self.container.count(".") + 1
            home = ".".join(part.map.split(".")[:depth])
        output, norm = (f"{home}.{names[part.role]}" if part.role in names else "" for names in (self.output, self.norm))
        part = replace(part, output=output) if output in modules and output else part
        if not norm or norm not in modules:
            return part
        post = self.post
        if not isinstance(post, bool):
            post = bool(config.get(post.removeprefix("!"))) != post.startswith("!")
        if post:
            return replace(part, norm=norm)
        own_sum = not parallel and not (self.unless and config.get(self.unless))
        return replace(part, residual=norm if own_sum else None)


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
        **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
        "olmo2": replace(_SANDWICH, norm=_roles("self_attn", "mlp")),
        "glm4": replace(_LLAMA, output=_roles("post_self_attn_layernorm", "post_mlp_layernorm")),
        "granite": _Row(),  # z is scaled before it is added
        "stablelm": replace(_LLAMA, output={"feed-forward": "dropout"}),
        "phi3": replace(_LLAMA, output=_roles("resid_attn_dropout", "resid_mlp_dropout")),
        **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "codegen"), _GPT2),
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
        "mpnet": _Row(_roles("attention.dropout", "output.dropout"), _roles("attention.LayerNorm", "output.LayerNorm"), post=True),
        "distilbert": _Row(norm=_roles("sa_layer_norm", "output_layer_norm"), post=True),
        "albert": _Row(_roles("attention.output_dropout", "ffn_output"), _roles("attention.LayerNorm", "full_layer_layer_norm"), post=True),
        "modernbert": _Row({"attention": "attn.out_drop"}, _roles("attn_norm", "mlp_norm")),
        **dict.fromkeys(("wav2vec2", "hubert"), _WAV2VEC2),
        **dict.fromkeys(("t5", "mt5"), _T5),
        **dict.fromkeys(("bart", "marian"), _BART),
        **dict.fromkeys(("mbart", "pegasus", "blenderbot", "whisper"), replace(_BART, post=False)),
        **dict.fromkeys(("vit", "deit"), _VIT),
        "beit": _Row(),  # z is scaled before it is added
        "dinov2": _Row(_roles("layer_scale1", "layer_scale2"), _roles("norm1", "norm2")),
        # attention returns windows; at drop_path they are undone
        "swin": replace(_VIT, output={"attention": "drop_path"}),
        **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"), _CLIP),
    }
)  # fmt: skip
"""``config.model_type`` -> its row. Tested on tiny models: what is listed is added to the residual."""


def sublayers(model: nn.Module) -> tuple[SubLayer, ...]:
    """Return the sub-layers of `model` in module order.

    Outside the table `output` is the feed-forward module or an output map, `norm` and `residual` None.

    Raises:
        TargetError: its layers, or the maps through which they write to the residual stream, are not known.
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
    configs = {path: part.config for path, part in pretrained_models(modules).items() if part.config.model_type in FAMILIES}
    found: list[SubLayer] = []
    for layer in layers:
        around = [path for path in configs if inside(layer, path)]
        config = configs[max(around, key=len)] if around else None
        row = None if config is None else _ROWS.get(config.model_type)
        values = {} if config is None else config.to_dict()
        for path in attentions.get(layer, ()):
            role: Role = "cross-attention" if is_cross_attention(path[len(layer) :]) else "attention"
            whole = [module for module in known.attention_modules if path.startswith(f"{module}.")]
            part = SubLayer(role=role, layer=layer, output=whole[0] if whole and row is not None else path, map=path)
            found.append(part if row is None else row.completed(part, values, modules, parallel=known.parallel_blocks))
        like = (maps.get(layer) or attentions.get(layer) or (None,))[-1]
        module = wholes.get(layer, (None,))[0]
        site = module or (maps.get(layer) or (None,))[-1]
        if site is not None and like is not None:
            entry = module or entries[layer][0]
            part = SubLayer(role="feed-forward", layer=layer, output=site, map=like, entry=entry, whole=module is not None)
            found.append(part if row is None else row.completed(part, values, modules, parallel=known.parallel_blocks))
    order = {path: position for position, path in enumerate(modules)}
    return tuple(sorted(found, key=lambda part: order[part.output]))


def _by_layer(paths: tuple[str, ...], layers: Mapping[str, tuple[str, int]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        layer = layer_above(path, layers)
        if layer is not None:
            found.setdefault(layer, []).append(path)
    return found


def layer_norms(model: nn.Module) -> tuple[str, ...]:
    """Return every layer norm (RMS norms too) with trainable parameters, in module order."""
    return tuple(path for path, module in base_modules(model) if is_norm(module) and not isinstance(module, _OTHER_NORMS))
