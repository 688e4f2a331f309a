"""A base in a GGUF file, read and dequantized by transformers; digits are split as in the tokenizer's training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base.builtin.convert import SINGLE_DIGITS, digit_split
from byway.base.quiet import quiet
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["check_gguf", "gguf_arguments", "gguf_tokenizer"]


def check_gguf(file: Path) -> None:
    """Raise ConfigError if `file` does not begin like a GGUF file, or accelerate, needed to read it, is missing."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as failure:
        raise ConfigError(f"cannot read {file}: {failure.strerror}") from failure
    if start != b"GGUF":
        raise ConfigError(f"{file} is not a GGUF file: it begins with {start!r}", "copy or download it again")
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(f"transformers needs accelerate to read {file}, and it is not installed", "pip install accelerate")


def gguf_arguments(file: Path) -> dict[str, Any]:
    """Return further arguments for ``from_pretrained``: the file, and dequantized tensors rather than packed blocks."""
    from transformers.utils import quantization_config

    arguments: dict[str, Any] = {"gguf_file": file.name}
    if "GgufConfig" in vars(quantization_config):  # earlier releases always dequantize
        arguments["quantization_config"] = vars(quantization_config)["GgufConfig"](dequantize=True)
    return arguments


def gguf_tokenizer(file: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `file`; fixes the splitting of digits (transformers knows only some of GGUF's rules)."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    with quiet(stderr=True):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, config=config, local_files_only=True)
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel):
        return tokenizer  # transformers knew the rule
    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and str(field.contents()) in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = digit_split()
    return tokenizer
