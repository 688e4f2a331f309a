"""The tokenizer of a base, without reading its weights, and the one stored with an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byway.base.blame import blaming
from byway.base.directory import check_directory, check_templates
from byway.base.gguf import check_gguf, gguf_tokenizer
from byway.base.load import base_directory
from byway.base.new_tokens import add_to_tokenizer
from byway.base.quiet import quiet
from byway.base.read_tokenizer import read_tokenizer
from byway.base.source import locate
from byway.errors import ConfigError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SAVED_FILES", "load_tokenizer", "save_tokenizer", "stored_tokenizer"]

TEMPLATE = "chat_template.jinja"
SAVED_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE, "additional_chat_templates",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
})  # fmt: skip
"""Names under which transformers saves tokenizers."""


def load_tokenizer(name_or_path: str | os.PathLike[str], add_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base that :func:`byway.load_base` would load, with `add_tokens` added.

    Raises:
        ConfigError: the base has none, or its files cannot be read.
    """
    from transformers import AutoConfig

    source = locate(os.fspath(name_or_path))
    if source.kind == "gguf":
        check_gguf(source.path)
        with blaming(f"the base {source.name!r}", "its tokenizer"), quiet(stderr=True):
            config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name, local_files_only=True)
            tokenizer = gguf_tokenizer(source.path, config)
        add_to_tokenizer(tokenizer, add_tokens, source.name)
        return tokenizer
    path = base_directory(source)
    if not check_directory(path).has_tokenizer:
        raise ConfigError(
            f"the base {source.name!r} has no tokenizer, so rows cannot be tokenized", "put the tokenizer's files into its directory"
        )
    tokenizer = read_tokenizer(path, f"the base {source.name!r}")
    tokenizer.name_or_path = source.name
    add_to_tokenizer(tokenizer, add_tokens, source.name)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, *, whole: bool = True) -> None:
    """Write a tokenizer into an adapter's directory; its chat template only if not `whole`."""
    try:
        if whole:
            with quiet():
                tokenizer.save_pretrained(directory)
        elif isinstance(tokenizer.chat_template, str):
            (directory / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    except OSError as error:
        raise RunError(f"the tokenizer cannot be written into {directory}: {error.strerror}") from error


def stored_tokenizer(directory: Path, base: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that :func:`save_tokenizer` (or another program) put into an adapter's directory.

    If there is only a chat template, `base` gets it. None if there is neither.

    Raises:
        ConfigError: its files cannot be read.
    """
    check_templates(directory)
    if (directory / "tokenizer_config.json").is_file():
        return read_tokenizer(directory, f"the adapter {str(directory)!r}", "remove its tokenizer files to use the base's")
    file = directory / TEMPLATE
    if base is None or not file.is_file():
        return None
    try:
        base.chat_template = file.read_text(encoding="utf-8-sig")  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, UnicodeDecodeError) as failure:
        raise ConfigError(f"{file} cannot be read: {failure}") from failure
    return base
