"""Tiny random models of the common families, the same on every machine: hidden 32, three layers, a vocabulary of 97."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 97
LAYERS = 3


def llama(**changes: Any) -> PreTrainedModel:
    """Grouped-query attention, tied embeddings."""
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | changes)))


def qwen2() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, **sizes))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, eos_token_id=2, bos_token_id=1)
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=128, pad_token_id=0, **sizes))


def _encoder() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, **sizes}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**_encoder(), num_labels=3))


def bert_mlm() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**_encoder()))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**_encoder(), num_labels=3))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes))


def vit() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "opt": opt,
    "bert": bert,
    "roberta": roberta,
    "t5": t5,
    "vit": vit,
}
DECODERS = ("llama", "qwen2", "gpt2", "opt")


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of that family, in evaluation mode, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that start at 0 and 1 would hide mistakes
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(family: str, seed: int = 1, rows: int = 2, length: int = 7) -> dict[str, Any]:
    """Arguments for a forward of that family."""
    g = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g)}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=g)
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, : length - 2], "use_cache": False}
    return {"input_ids": ids} | ({"use_cache": False} if family in DECODERS else {})


def randomize(parameters: Any, seed: int = 3, scale: float = 0.1) -> None:
    """Fill an adapter's tensors with numbers, so that it does something (B = 0 would make every comparison pass)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g, dtype=torch.float32))
