"""Random models of known shapes, written as checkpoints: what is timed does not depend on the values of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "write_random"]

SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tiny-shape": (
        "llama",
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"vocab_size": 512, "tie_word_embeddings": True},
    ),
    "small-shape": (
        "llama",
        {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 3}
        | {"vocab_size": 8192, "tie_word_embeddings": True},
    ),
    "smollm2-135m-shape": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "qwen2-0.5b-shape": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "llama-1b-shape": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 128256, "tie_word_embeddings": True},
    ),
}
"""Name → (model type, sizes)."""


def write_random(name: str, directory: Path, dtype: str) -> Path:
    """A checkpoint of random weights with a tokenizer of a few words; the same on every machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[name]
    config = AutoConfig.for_model(kind, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    weights = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    AutoModelForCausalLM.from_config(config, dtype=weights).save_pretrained(directory)
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    """The rows are token ids; trainers want a tokenizer all the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **named).save_pretrained(directory)
