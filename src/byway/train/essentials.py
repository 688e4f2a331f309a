"""What must stay the same for a resumed run to be the same run, and what may change.

* :data:`FREE` may change: learning rate, length and schedule, how often to evaluate, save and log.
* :data:`ROUNDING` may change, but then the run is no longer bit-identical: threads, device, micro-batches, levers.
* Everything else must be the same: method, base, rows, optimizer, seed, batch size. Rows and base are compared by
  content, not by path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from byway.base.arithmetic.float32 import computed
from byway.base.fingerprint import Fingerprint, compare, fingerprint
from byway.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from byway.recipe.recipe import Recipe

__all__ = ["FREE", "ROUNDING", "check_unchanged", "essentials"]

FREE = frozenset(
    f"train.{key}"
    for key in (
        "learning_rate", "epochs", "max_steps", "schedule", "warmup_ratio", "warmup_steps",
        "eval_every", "save_every", "keep_checkpoints", "patience", "tensorboard",
    )
)  # fmt: skip
"""Recipe keys that may change when a run is resumed."""

_PLACE = ("engine.cache", "engine.cache_dtype", "engine.cache_limit_gb")
"""The cache's place and size limit change nothing; whether and how exactly states are cached is compared separately."""

ROUNDING = ("train.threads", "train.micro_batch_tokens", "base.device", "base.compute", "engine.")
"""Keys and prefixes that change only the order of summation or random draws; ``base.compute: int8`` changes more."""

_BY_CONTENT = ("base.model", "data.")
"""Keys that are compared only to explain why contents differ."""


def essentials(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Mapping[str, str],
    *,
    cache: str,
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the flat, resolved recipe and the contents behind its paths: the base's fingerprint, digests of `rows`.

    `cache`: how cached states are stored, or ``off``; `memory`: the memory plan's decisions, which a resumed run keeps.
    """
    values = json.loads(json.dumps(recipe.to_dict()))
    del values["output"]
    values["base"]["compute"] = computed(model)  # auto differs between processors
    base = fingerprint(model, tokenizer).to_dict()
    return {"recipe": flat(values), "rows": dict(rows), "base": base, "cache": cache, "memory": dict(memory)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"train": {"seed": 0}}`` to ``{"train.seed": 0}``; lists of mappings by index."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return {k: v for index, inner in enumerate(value) for k, v in flat(inner, f"{prefix}.{index}").items()}
    return {prefix: value}


def check_unchanged(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Return notes on what changed and may change.

    Raises:
        ConfigError: something that must not change did, with a line for each field.
    """
    old, new, missing = saved["recipe"], now["recipe"], object()
    differing = [key for key in dict.fromkeys([*old, *new]) if key not in _PLACE and old.get(key, missing) != new.get(key, missing)]
    changed = {key: f"{key}: {_shown(old, key)} in the checkpoint, {_shown(new, key)} now" for key in differing}
    explained = {key: text for key, text in changed.items() if key.startswith(_BY_CONTENT)}
    approximated = "int8" in (old.get("base.compute"), new.get("base.compute"))
    rounding = {key for key in changed if key.startswith(ROUNDING) and not (approximated and key == "base.compute")}
    notes = [f"{changed[key]}: the run is no longer bit-identical to an uninterrupted one" for key in changed if key in rounding]
    notes += [f"changed on resume: {text}" for key, text in changed.items() if key in FREE]
    lines = [text for key, text in changed.items() if key not in FREE and key not in explained and key not in rounding]
    before, cache = saved.get("cache", "off"), now.get("cache", "off")
    if before != cache:
        lines.append(f"engine.cache: states were {_read(before)} in the checkpoint, {_read(cache)} now")
    for name in saved["rows"].keys() | now["rows"].keys():
        if saved["rows"].get(name) != now["rows"].get(name):
            own = [text for key, text in explained.items() if key.startswith("data.")]
            lines.append(f"data.{name}: the rows differ from those of the checkpoint" + (f" ({'; '.join(own)})" if own else ""))
    verdict = compare(Fingerprint.from_dict(saved["base"], where), Fingerprint.from_dict(now["base"]))
    if not verdict.same:
        lines.append(f"base.model: a different base ({'; '.join(verdict.differences)})")
    if lines:
        raise ConfigError(
            "\n".join([f"{where} belongs to a different run; changed since:", *(f"  {line}" for line in sorted(lines))]),
            "restore these, or start over with another output or --overwrite; a resumed run may change "
            + ", ".join(sorted(key.removeprefix("train.") for key in FREE)),
        )
    return notes


def _read(cache: str) -> str:
    return "computed" if cache == "off" else "read from a cache" if cache == "same" else f"read from a cache stored as {cache}"


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"
