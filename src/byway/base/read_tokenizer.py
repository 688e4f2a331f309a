"""Read the tokenizer in a directory, and try it: broken files are found here, not in the middle of a run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base.blame import blaming
from byway.base.quiet import quiet
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_tokenizer"]

_CONVERTERS = {"sentencepiece": "sentencepiece", "protobuf": "google"}
"""Packages that transformers needs to convert a SentencePiece model, and what they are imported as."""


def read_tokenizer(path: Path, owner: str, hint: str = "") -> PreTrainedTokenizerBase:
    """Return the tokenizer in the directory `path`; its chat template without a byte-order mark.

    `owner`, `hint`: whose it is, and what to do if it is broken, for messages.

    Raises:
        ConfigError: its files cannot be read, need code of their own, or make a tokenizer that cannot encode a text.
    """
    from transformers import AutoTokenizer

    with blaming(owner, "its tokenizer", hint or _advice(path)), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.encode("a \ue000")  # a character that no vocabulary has
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ConfigError(
            f"{owner} cannot be loaded: its model_max_length is {tokenizer.model_max_length!r}, not a number",
            "correct its tokenizer_config.json",
        )
    tokenizer.chat_template = _checked(tokenizer.chat_template, owner)
    return tokenizer


def _checked(template: Any, owner: str) -> Any:
    """Return a chat template, or several by name, without byte-order marks. Raises ConfigError if it is no text."""
    found = template if isinstance(template, dict) else {"": template}
    if wrong := [type(text).__name__ for text in found.values() if text is not None and not isinstance(text, str)]:
        raise ConfigError(
            f"{owner} cannot be loaded: its chat template is {wrong[0]}, not text",
            "correct chat_template in its tokenizer_config.json",
        )
    bare = {kind: None if text is None else text.removeprefix("\ufeff") for kind, text in found.items()}
    return bare if isinstance(template, dict) else bare[""]


def _advice(path: Path) -> str:
    """Say what is missing to read the tokenizer's files."""
    models = [file.name for file in path.glob("*.model")]
    missing = [package for package, module in _CONVERTERS.items() if find_spec(module) is None]
    if not models or (path / "tokenizer.json").is_file() or not missing:
        return "copy or download its tokenizer files again"
    return f"{models[0]} is a SentencePiece model, to be converted: pip install {' '.join(missing)}"
