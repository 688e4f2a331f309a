"""Small random models of the eight families; heads, head size, key heads, layers and widths are drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.tiny import VOCABULARY

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
_LONGEST: dict[str, Any] = {"max_position_embeddings": 128}
_GENERATES: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_CLASSES: dict[str, Any] = {"num_labels": 3}


def drawn(family: str, seed: int) -> dict[str, int]:
    """Draw sizes that fit every method, including ladders of a half, a quarter or an eighth of the width."""
    draw = random.Random(f"{seed} {family}")
    heads, head = draw.choice((4, 6)), draw.choice((8, 16))
    wide = draw.choice((48, 64, 96))
    key_heads = draw.choice((1, 2)) if head == 16 else 2
    return {"heads": heads, "head": head, "hidden": heads * head, "key_heads": key_heads, "layers": draw.choice((2, 3)), "wide": wide}


def described(seed: int) -> dict[str, str]:
    """Describe the sizes from :func:`drawn`."""
    found = {}
    for family in MODELS:
        s = drawn(family, seed)
        shared = f", key heads: {s['key_heads']}" if family in ("llama", "qwen2") else ""
        found[family] = f"{s['layers']} layers, width {s['hidden']}, {s['heads']} heads{shared}"
    return found


def _usual(s: dict[str, int]) -> dict[str, Any]:
    return {"hidden_size": s["hidden"], "intermediate_size": s["wide"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"]}


def _llama(s: dict[str, int]) -> Any:
    own: dict[str, Any] = {"num_key_value_heads": s["key_heads"], "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**_TOKENS, **_LONGEST, **_GENERATES, **_usual(s), **own))


def _qwen2(s: dict[str, int]) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**_TOKENS, **_LONGEST, **_GENERATES, **_usual(s), num_key_value_heads=s["key_heads"]))


def _gpt2(s: dict[str, int]) -> Any:
    sizes: dict[str, Any] = {"n_embd": s["hidden"], "n_layer": s["layers"], "n_head": s["heads"], "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**_TOKENS, **_GENERATES, **sizes))


def _opt(s: dict[str, int]) -> Any:
    sizes = _usual(s)
    sizes |= {"ffn_dim": sizes.pop("intermediate_size"), "word_embed_proj_dim": s["hidden"]}
    return OPTForCausalLM(OPTConfig(**_TOKENS, **_LONGEST, **_GENERATES, **sizes))


def _bert(s: dict[str, int]) -> Any:
    return BertForSequenceClassification(BertConfig(**_TOKENS, **_LONGEST, **_CLASSES, **_usual(s)))


def _roberta(s: dict[str, int]) -> Any:
    return RobertaForSequenceClassification(RobertaConfig(**_TOKENS, **_LONGEST, **_CLASSES, **_usual(s)))


def _t5(s: dict[str, int]) -> Any:
    sizes = {"d_model": s["hidden"], "d_kv": s["head"], "d_ff": s["wide"], "num_layers": s["layers"], "num_heads": s["heads"]}
    starts: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**_TOKENS, **sizes, **starts))


def _vit(s: dict[str, int]) -> Any:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **_CLASSES, **_usual(s)))


MODELS = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "opt": _opt, "bert": _bert, "roberta": _roberta, "t5": _t5, "vit": _vit}
FAMILIES = tuple(MODELS)
TITLES = dict(zip(FAMILIES, ("Llama", "Qwen2", "GPT-2", "OPT", "BERT", "RoBERTa", "T5", "ViT"), strict=True))


def build(family: str, seed: int) -> Any:
    """Return the model in evaluation mode. Biases and norms get noise: at 0 and 1 they would hide mistakes."""
    torch.manual_seed(seed)
    model = MODELS[family](drawn(family, seed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
