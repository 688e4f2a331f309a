"""Convert a Llama GGUF file, with its tokenizer, to a transformers directory; dequantization is exact.

Used for the built-in base only, whose file is known byte for byte. Other GGUF files go through transformers
(``gguf.py``), which needs accelerate and five times as long, and splits digits differently from the tokenizer's
training.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["SINGLE_DIGITS", "convert_llama", "digit_split"]

ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the GGUF token type of control tokens, such as <|im_end|>
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of ``tokenizer.ggml.pre`` whose vocabularies were trained on text with digits split one by one."""


def convert_llama(gguf_file: Path, directory: Path, *, initializer_range: float, origin: str) -> None:
    """Write the configs, ``model.safetensors`` and tokenizer of `gguf_file` into the existing `directory`.

    float32 is the smallest dtype for the dequantized values: a Q4_1 weight is d·q + m with 16-bit d and m.
    `initializer_range`: for a head that is added later (GGUF does not record it); `origin`: a description of the
    weights for config.json.
    """
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaConfig

    from byway.core.disk.files import write_safetensors

    reader = GGUFReader(gguf_file)
    fields = {
        "vocab_size": len(_read(reader, "tokenizer.ggml.tokens")),
        "hidden_size": _read(reader, "llama.embedding_length"),
        "intermediate_size": _read(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _read(reader, "llama.block_count"),
        "num_attention_heads": _read(reader, "llama.attention.head_count"),
        "num_key_value_heads": _read(reader, "llama.attention.head_count_kv"),
        "head_dim": _read(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _read(reader, "llama.context_length"),
        # stored as a 32-bit float: 1e-5 reads as 9.999999747378752e-06
        "rms_norm_eps": float(f"{_read(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_read(reader, "llama.rope.freq_base"))},
        "bos_token_id": _read(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _read(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _read(reader, "tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    config = LlamaConfig(**fields, architectures=["LlamaForCausalLM"], dtype="float32", initializer_range=initializer_range)
    config.weights_origin = origin
    config.save_pretrained(directory)
    special = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(directory)
    _tokenizer(reader, fields["max_position_embeddings"]).save_pretrained(directory)
    write_safetensors(directory / "model.safetensors", _tensors(reader, fields["num_attention_heads"], fields["num_key_value_heads"]))


def digit_split() -> PreTokenizer:
    """Split digits, then GPT-2's words; without the first, "\\n\\n1" has other tokens than in the model's training."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _read(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ConfigError(f"the GGUF file has no field {key!r}")
    return field.contents()


def _tensors(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Return transformers' name -> float32 tensor for every tensor of the file; ConfigError for an unknown one."""
    import numpy as np
    import torch
    from gguf import dequantize

    tensors: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for entry in reader.tensors:
        name = _transformers_name(entry.name)
        if name is None:
            unknown.append(entry.name)
            continue
        values = dequantize(entry.data, entry.tensor_type)
        if name.endswith("q_proj.weight"):
            values = _halves_apart(values, heads)
        elif name.endswith("k_proj.weight"):
            values = _halves_apart(values, kv_heads)
        tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: some are views of the mapped file
    if unknown:
        raise ConfigError(f"the GGUF file has tensors that a Llama does not have: {listed(unknown, 5)}")
    return tensors


def _transformers_name(name: str) -> str | None:
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = block.groups()
        return f"model.layers.{number}.{BLOCK_NAMES[part]}.{kind}" if part in BLOCK_NAMES else None
    part, _, kind = name.rpartition(".")
    return f"{ROOT_NAMES[part]}.{kind}" if part in ROOT_NAMES else None


def _halves_apart(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows (heads·2h, in) from GGUF's rotary pairs (0,1),(2,3),… to transformers' (0,h),(1,h+1),…"""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(reader: GGUFReader, max_length: int) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _read(reader, "tokenizer.ggml.tokens")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in _read(reader, "tokenizer.ggml.merges"))]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    pre = _read(reader, "tokenizer.ggml.pre")
    bpe.pre_tokenizer = digit_split() if pre in SINGLE_DIGITS else pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    types = _read(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    special = {
        role: tokens[_read(reader, f"tokenizer.ggml.{field}_token_id")]
        for role, field in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = _read(reader, "tokenizer.chat_template")
    return tokenizer
