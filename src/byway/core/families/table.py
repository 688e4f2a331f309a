"""The table of architecture facts: one row per family, data without code.

Patterns are dotted paths in which ``*`` stands for one segment and ``{a,b}`` for either name. Patterns of stacks start
at the trunk and end at the container of the layers; all others start at a layer. A pattern for modules that a variant
of the family lacks (a gate, a cross-attention) matches nothing there. Every row is tested on a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

__all__ = ["FAMILIES", "Family", "Kind"]

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts that all models of one ``config.model_type`` share."""

    kind: Kind
    stacks: Mapping[str, str]
    """Stack name -> pattern of the container of its layers."""
    attention: tuple[str, ...]
    """Linear maps of the attentions, in the order q, k, v, output; the last one writes to the residual stream."""
    feed_forward: tuple[str, ...]
    """Linear maps of the feed-forward part; the last one writes to the residual stream."""
    attention_modules: tuple[str, ...]
    """Modules in which queries meet keys."""
    feed_forward_modules: tuple[str, ...] = ()
    """Whole feed-forward parts without residual and norm; empty if their maps are children of the layer."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Default targets."""
    registry: bool = True
    """True if attention goes through transformers' ``ALL_ATTENTION_FUNCTIONS``."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Leaf name -> layout of the fused maps (``fused.py``)."""
    parallel: bool | tuple[str, ...] = False
    """True if attention and feed-forward read the same input, or if one of these configuration fields is set."""
    decoder_called_alone: bool = False
    """True if models with only a decoder call it directly, so that the trunk around it never runs."""
    task_heads: tuple[str, ...] = ()
    """Newly initialized parts of this family's heads besides the usual names."""


_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_LLAMA = Family(
    kind="decoder",
    stacks={"decoder": "layers"},
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    feed_forward=_GATED,
    attention_modules=("self_attn",),
    feed_forward_modules=("mlp",),
)
_GPT2 = Family(
    kind="decoder",
    stacks={"decoder": "h"},
    attention=("attn.c_attn", "attn.c_proj"),
    feed_forward=("mlp.c_fc", "mlp.c_proj"),
    attention_modules=("attn",),
    feed_forward_modules=("mlp",),
    targets=("c_attn",),
    fused={"c_attn": "qkv"},
)
_GPTJ = replace(
    _GPT2,
    attention=("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
    feed_forward=("mlp.fc_in", "mlp.fc_out"),
    targets=("q_proj", "v_proj"),
    fused={},
    registry=False,
    parallel=True,
)
_BLOOM = Family(
    kind="decoder",
    stacks={"decoder": "h"},
    attention=("self_attention.query_key_value", "self_attention.dense"),
    feed_forward=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    attention_modules=("self_attention",),
    feed_forward_modules=("mlp",),
    targets=("query_key_value",),
    registry=False,
    fused={"query_key_value": "qkv per head"},
)
_BERT = Family(
    kind="encoder",
    stacks={"encoder": "encoder.layer"},
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    attention_modules=("attention.self",),
    targets=("query", "value"),
)
_BART = Family(
    kind="encoder-decoder",
    stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
    attention=tuple(f"{{self_attn,encoder_attn}}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")),
    feed_forward=("fc1", "fc2"),
    attention_modules=("self_attn", "encoder_attn"),
    decoder_called_alone=True,
)
_T5 = Family(
    kind="encoder-decoder",
    stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
    attention=tuple(f"layer.*.{{SelfAttention,EncDecAttention}}.{leaf}" for leaf in "qkvo"),
    feed_forward=("layer.*.DenseReluDense.{wi,wi_0,wi_1}", "layer.*.DenseReluDense.wo"),
    attention_modules=("layer.*.SelfAttention", "layer.*.EncDecAttention"),
    feed_forward_modules=("layer.*.DenseReluDense",),
    targets=("q", "v"),
)
_VIT = Family(
    kind="vision",
    stacks={"encoder": "layers"},
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    feed_forward=("mlp.fc1", "mlp.fc2"),
    attention_modules=("attention",),
    feed_forward_modules=("mlp",),
)
_CLIP_TOWER = Family(
    kind="vision",
    stacks={"encoder": "{text_model.,vision_model.,}encoder.layers"},
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    feed_forward=("mlp.fc1", "mlp.fc2"),
    attention_modules=("self_attn",),
    feed_forward_modules=("mlp",),
)
_CLIP = replace(_CLIP_TOWER, stacks={"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"})
_WAV2VEC2 = Family(
    kind="encoder",
    stacks={"encoder": "encoder.layers"},
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
    feed_forward=("feed_forward.intermediate_dense", "feed_forward.output_dense"),
    attention_modules=("attention",),
    feed_forward_modules=("feed_forward",),
    task_heads=("projector",),
)
_GLM = replace(_LLAMA, feed_forward=("mlp.gate_up_proj", "mlp.down_proj"), fused={"gate_up_proj": "gate up"})
_UP_DOWN = replace(_LLAMA, feed_forward=("mlp.up_proj", "mlp.down_proj"))

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        # decoders of llama's shape
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
        **dict.fromkeys(("olmo", "olmo2", "granite", "smollm3"), _LLAMA),
        "qwen3_moe": _LLAMA,
        "stablelm": replace(_LLAMA, parallel=("use_parallel_residual",)),
        **dict.fromkeys(("cohere", "cohere2"), replace(_LLAMA, parallel=True)),
        "nemotron": _UP_DOWN,
        "starcoder2": replace(_LLAMA, feed_forward=("mlp.c_fc", "mlp.c_proj")),
        **dict.fromkeys(("glm", "glm4"), _GLM),
        "phi3": replace(
            _GLM,
            attention=("self_attn.qkv_proj", "self_attn.o_proj"),
            targets=("qkv_proj",),
            fused={"qkv_proj": "qkv", "gate_up_proj": "gate up"},
        ),
        "phi": replace(
            _LLAMA,
            attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
            feed_forward=("mlp.fc1", "mlp.fc2"),
            targets=("q_proj", "v_proj", "fc1", "fc2"),
            parallel=True,
        ),
        # mixtures of experts: the experts themselves are 3-D parameters
        **dict.fromkeys(("mixtral", "olmoe", "gpt_oss"), replace(_LLAMA, feed_forward=())),
        "qwen2_moe": replace(_LLAMA, feed_forward=tuple(f"mlp.{{shared_expert.,}}{leaf}_proj" for leaf in ("gate", "up", "down"))),
        "deepseek_v3": replace(
            _LLAMA,
            attention=tuple(f"self_attn.{n}" for n in ("{q_proj,q_a_proj}", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
            feed_forward=tuple(f"mlp.{{shared_experts.,}}{leaf}_proj" for leaf in ("gate", "up", "down")),
            targets=("q_proj", "q_b_proj", "kv_b_proj"),
        ),
        # decoders of other shapes
        "gpt2": _GPT2,
        "gpt_bigcode": replace(_GPT2, fused={"c_attn": "qkv of one key head"}),
        "gpt_neo": replace(
            _GPTJ,
            attention=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj"),
            feed_forward=("mlp.c_fc", "mlp.c_proj"),
            attention_modules=("attn.attention",),
            parallel=False,
        ),
        "gptj": _GPTJ,
        "codegen": replace(_GPTJ, attention=("attn.qkv_proj", "attn.out_proj"), targets=("qkv_proj",), fused={"qkv_proj": "qvk in four"}),
        "gpt_neox": replace(
            _BLOOM,
            stacks={"decoder": "layers"},
            attention=("attention.query_key_value", "attention.dense"),
            attention_modules=("attention",),
            registry=True,
            parallel=("use_parallel_residual",),
        ),
        "bloom": _BLOOM,
        "falcon": replace(_BLOOM, fused={"query_key_value": "qkv of falcon"}, parallel=("parallel_attn", "new_decoder_architecture")),
        "mpt": replace(
            _GPT2,
            stacks={"decoder": "blocks"},
            attention=("attn.Wqkv", "attn.out_proj"),
            feed_forward=("ffn.up_proj", "ffn.down_proj"),
            feed_forward_modules=(),  # MptMLP adds the residual itself
            targets=("Wqkv",),
            registry=False,
            fused={"Wqkv": "qkv"},
        ),
        "opt": replace(
            _BART,
            kind="decoder",
            stacks={"decoder": "decoder.layers"},
            attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
            attention_modules=("self_attn",),
        ),
        # encoders
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
        "mpnet": replace(
            _BERT,
            attention=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
            attention_modules=("attention.attn",),
            targets=("q", "v"),
            registry=False,
        ),
        "deberta": replace(
            _BERT,
            attention=("attention.self.in_proj", "attention.self.pos_proj", "attention.self.pos_q_proj", "attention.output.dense"),
            targets=("in_proj",),
            registry=False,
            fused={"in_proj": "qkv per head"},
            task_heads=("pooler",),
        ),
        "deberta-v2": replace(
            _BERT,
            attention=(
                *(f"attention.self.{n}" for n in ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")),
                "attention.output.dense",
            ),
            targets=("query_proj", "value_proj"),
            registry=False,
            task_heads=("pooler",),
        ),
        "distilbert": replace(
            _BERT,
            stacks={"encoder": "transformer.layer"},
            attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
            feed_forward=("ffn.lin1", "ffn.lin2"),
            attention_modules=("attention",),
            feed_forward_modules=("ffn",),
            targets=("q_lin", "v_lin"),
        ),
        "albert": replace(
            _BERT,
            stacks={"encoder": "encoder.albert_layer_groups.*.albert_layers"},
            attention=("attention.query", "attention.key", "attention.value", "attention.dense"),
            feed_forward=("ffn", "ffn_output"),
            attention_modules=("attention",),
        ),
        "modernbert": replace(
            _BERT,
            stacks={"encoder": "layers"},
            attention=("attn.Wqkv", "attn.Wo"),
            feed_forward=("mlp.Wi", "mlp.Wo"),
            attention_modules=("attn",),
            feed_forward_modules=("mlp",),
            targets=("Wqkv",),
            fused={"Wqkv": "qkv", "Wi": "gate up"},
        ),
        **dict.fromkeys(("wav2vec2", "hubert"), _WAV2VEC2),
        # encoder-decoders
        **dict.fromkeys(("t5", "mt5"), _T5),
        **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot"), _BART),
        "whisper": replace(_BART, task_heads=("projector",)),
        # vision
        **dict.fromkeys(("vit", "deit", "beit"), _VIT),
        "dinov2": replace(
            _VIT,
            stacks={"encoder": "encoder.layer"},
            feed_forward=("mlp.{fc1,gate_proj}", "mlp.up_proj", "mlp.{fc2,down_proj}"),
        ),
        "swin": replace(_VIT, stacks={"encoder": "encoder.layers.*.blocks"}),
        **dict.fromkeys(("clip", "siglip"), _CLIP),
        **dict.fromkeys(("clip_text_model", "siglip_text_model"), replace(_CLIP_TOWER, kind="encoder")),
        **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), _CLIP_TOWER),
    }
)
"""``config.model_type`` -> its facts."""
