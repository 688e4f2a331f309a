"""What a run decides about a model beside its weights: names of the classes, kind of the problem, padding token.

A merged model's config.json must state them, or a pipeline would answer with the class names of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byway.base.padding import text_config
from byway.core.disk.files import read_json, to_json
from byway.errors import ConfigError

__all__ = ["differing", "write", "write_padding"]

_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")


def write(config: Any, into: dict[str, Any], directory: Path) -> None:
    """Write the decisions in a model's configuration `config` into the content of a config.json.

    Only what differs from the base in `directory` is written, so that everything else stays as its authors wrote it.
    """
    from transformers import AutoConfig

    own, base = _stated(config), _stated(AutoConfig.from_pretrained(directory, local_files_only=True))
    changed = {key: value for key, value in own.items() if value != base[key]}
    if "id2label" in changed or "label2id" in changed:
        changed |= {key: own[key] for key in ("id2label", "label2id")}
        for stale in ("num_labels", "_num_labels"):
            into.pop(stale, None)
    text = into.get("text_config")
    if "pad_token_id" in changed and isinstance(text, dict):
        text["pad_token_id"] = changed["pad_token_id"]
        if into.get("pad_token_id") is None:
            del changed["pad_token_id"]
    into |= changed


def write_padding(tokenizer: Any, directory: Path) -> None:
    """Name the tokenizer's padding token in its files, if these name none, or one outside the vocabulary."""
    from transformers import AutoTokenizer

    token = tokenizer.pad_token
    if AutoTokenizer.from_pretrained(directory, local_files_only=True).pad_token == token:
        return
    main, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    for file in (main, older) if older.is_file() else (main,):
        stated = read_json(file, error=ConfigError) if file.is_file() else {}
        file.write_text(to_json(stated | {"pad_token": token}), encoding="utf-8")


def differing(wanted: Any, found: Any) -> list[str]:
    """Return what the configuration `found` states otherwise than `wanted`, in words."""
    pairs = {key: (_stated(wanted)[key], _stated(found)[key]) for key in _KEYS}
    return [f"the merged config.json says {key}: {have!r}, not {want!r}" for key, (want, have) in pairs.items() if want != have]


def _stated(config: Any) -> dict[str, Any]:
    text = text_config(config)
    values = config.to_dict() | ({} if text is None else {"pad_token_id": text.to_dict().get("pad_token_id")})
    names = {int(index): name for index, name in (config.id2label or {}).items()}
    return {key: values.get(key) for key in _KEYS} | {"id2label": names, "label2id": dict(config.label2id or {})}
