"""Blocks of the families that support ladders: the fields of their widths, and which maps belong together.

Patterns start at a layer; ``{a,b}`` stands for either name, ``*`` for one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = ["KINDS", "Attention", "Kind"]


@dataclass(frozen=True)
class Attention:
    """The linear maps of one attention; a fused map has the same name for queries, keys and values."""

    query: str
    key: str
    value: str
    output: str
    cross: bool = False
    """True if keys and values are computed from the encoder's output."""

    @property
    def fused(self) -> bool:
        """True if one map computes queries, keys and values, in this order."""
        return self.query == self.key


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The maps and configuration fields of one kind of transformer block."""

    attentions: tuple[Attention, ...]
    ups: tuple[str, ...]
    """Maps into the feed-forward part: one, or two whose outputs are multiplied."""
    down: str
    final_norm: str | None
    """The stack's last norm; None if each block ends with one."""
    exit: str | None = None
    """A map after the last norm to the width that the head reads, if there is one; it counts as frozen head."""
    width: str = "hidden_size"
    feed_forward: str = "intermediate_size"
    feed_forward_too: tuple[str, ...] = ()
    """Further fields of feed-forward widths: an encoder-decoder may have one for each stack."""
    head: str | None = None
    """The configuration's field for the head size, if that is not always width / heads."""
    rotary: str | None = None
    """The stack's rotary embedding."""
    same_as_width: tuple[str, ...] = ()
    """Further fields that must equal the width."""
    key_bias: bool = True
    """True if a bias of the keys has an effect. Without rotary positions softmax cancels it."""
    head_norms: bool = False
    """True if all heads share a norm, so that all must keep the same coordinates."""
    prunable: bool = True
    """True if it is known which coordinates of the maps belong together, so that side blocks can start pruned."""
    position_table: str | None = None
    """The relative position bias, which only the first block has."""


_ATTENTION = Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

_LLAMA = Kind(
    attentions=(_ATTENTION,),
    ups=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    final_norm="norm",
    head="head_dim",
    rotary="rotary_emb",
)
_GPT2 = Kind(
    attentions=(Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),),
    ups=("mlp.c_fc",),
    down="mlp.c_proj",
    final_norm="ln_f",
    feed_forward="n_inner",
)
_OPT = Kind(
    attentions=(replace(_ATTENTION, output="self_attn.out_proj"),),
    ups=("fc1",),
    down="fc2",
    final_norm="final_layer_norm",
    exit="project_out",
    feed_forward="ffn_dim",
    same_as_width=("word_embed_proj_dim",),
    key_bias=False,
)
_BERT = Kind(
    attentions=(Attention("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),),
    ups=("intermediate.dense",),
    down="output.dense",
    final_norm=None,
    key_bias=False,
)
_VIT = Kind(
    attentions=(Attention("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),),
    ups=("mlp.fc1",),
    down="mlp.fc2",
    final_norm="layernorm",
    key_bias=False,
)


def _t5(at: str, *, cross: bool = False) -> Attention:
    return Attention(f"{at}.q", f"{at}.k", f"{at}.v", f"{at}.o", cross)


_T5 = Kind(
    attentions=(_t5("layer.0.SelfAttention"), _t5("layer.1.EncDecAttention", cross=True)),
    ups=("layer.*.DenseReluDense.{wi,wi_0,wi_1}",),
    down="layer.*.DenseReluDense.wo",
    final_norm="final_layer_norm",
    width="d_model",
    feed_forward="d_ff",
    head="d_kv",
    position_table="layer.0.SelfAttention.relative_attention_bias",
)


def _bart(at: str, *, cross: bool = False) -> Attention:
    return Attention(f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj", f"{at}.out_proj", cross)


_BART = Kind(
    attentions=(_bart("self_attn"), _bart("encoder_attn", cross=True)),
    ups=("fc1",),
    down="fc2",
    final_norm=None,
    width="d_model",
    feed_forward="encoder_ffn_dim",
    feed_forward_too=("decoder_ffn_dim",),
    key_bias=False,
)
_NEOX = Kind(
    attentions=(Attention("attention.query_key_value", "attention.query_key_value", "attention.query_key_value", "attention.dense"),),
    ups=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="final_layer_norm",
    rotary="rotary_emb",
    prunable=False,  # heads are interleaved, and only some of their coordinates are rotated
)

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
        "qwen3": replace(_LLAMA, head_norms=True),
        **dict.fromkeys(("gemma", "granite", "olmo", "smollm3"), _LLAMA),
        "gpt2": _GPT2,
        "opt": _OPT,
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
        "vit": _VIT,
        **dict.fromkeys(("bart", "marian"), _BART),
        **dict.fromkeys(("mbart", "pegasus", "blenderbot"), replace(_BART, final_norm="layer_norm")),
        "gpt_neox": _NEOX,
        **dict.fromkeys(("t5", "mt5"), _T5),
    }
)
"""``config.model_type`` → kind of its blocks. Each is tested."""
