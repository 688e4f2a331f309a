"""``load_tokenizer``: the tokenizer of a base, without reading its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from byway.base.directory import check_directory
from byway.base.gguf import check_gguf, gguf_tokenizer
from byway.base.load import base_directory
from byway.base.new_tokens import add_to_tokenizer
from byway.base.quiet import quiet
from byway.base.source import locate
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(name_or_path: str | os.PathLike[str], add_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base that :func:`byway.load_base` would load, with `add_tokens` added.

    Raises:
        ConfigError: the base has none.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = locate(os.fspath(name_or_path))
    if source.kind == "gguf":
        check_gguf(source.path)
        with quiet(stderr=True):
            config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name, local_files_only=True)
        tokenizer = gguf_tokenizer(source.path, config)
        add_to_tokenizer(tokenizer, add_tokens, source.name)
        return tokenizer
    path = base_directory(source)
    if not check_directory(path).has_tokenizer:
        raise ConfigError(
            f"the base {source.name!r} has no tokenizer, so rows cannot be tokenized", "put the tokenizer's files into its directory"
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = source.name
    add_to_tokenizer(tokenizer, add_tokens, source.name)
    return tokenizer
