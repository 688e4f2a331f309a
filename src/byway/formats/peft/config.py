"""HF peft's ``adapter_config.json``: its fields, the modules they select, and how to write a selection.

Matching follows peft. A string is a regular expression for the whole path; a list entry is a path, or its end from a
dot on. Excluded modules and those trained whole (``modules_to_save``) are never targets. ``layers_to_transform``
looks at the first number in the path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from byway.core.disk.files import read_json
from byway.core.fields import Count, wrong
from byway.core.method import Method
from byway.core.peft_format import PeftFormat
from byway.core.targets.patterns import compile_pattern
from byway.errors import AdapterError, listed, nearest

__all__ = [
    "CONFIG", "KNOWN", "PEFT_VERSION", "PREFIX", "WEIGHTS", "Selection", "checked_config", "peft_format", "read_config",
    "selected_by_ending", "write_saved", "write_targets",
]  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21"
"""The version of peft whose fields are known here."""

_COMMON = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip
_TARGETS = {"exclude_modules", "target_modules"}
_LORA = _TARGETS | {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "qalora_group_size", "r", "rank_pattern", "runtime_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
_PROMPT = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
KNOWN: Mapping[str, set[str]] = {
    "LORA": _LORA,
    "ADALORA": _LORA | {"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"},
    "IA3": _TARGETS | {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights"},
    "LN_TUNING": _TARGETS,
    "PREFIX_TUNING": _PROMPT | {"encoder_hidden_size", "init_weights", "prefix_projection"},
    "PROMPT_TUNING": _PROMPT | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"},
    "P_TUNING": _PROMPT | {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"},
}
"""peft_type → the fields of its configuration, in addition to those that all have."""


def peft_format(method: Method | type[Method]) -> PeftFormat[Any]:
    """Return how HF peft writes `method`; AdapterError if peft does not have it."""
    if method.peft is None:
        name = (method if isinstance(method, type) else type(method)).__name__
        raise AdapterError(f"HF peft has no format for {name}", "save it in Byway's own format")
    return method.peft


def read_config(directory: Path, known_types: Collection[str], *, allow_unknown_fields: bool, notes: list[str]) -> dict[str, Any]:
    """Return the configuration in `directory`, checked: a known ``peft_type``, and no field of a newer peft in use.

    Unknown fields that are off (null, false, empty) are noted. Others raise an AdapterError, or are noted with
    `allow_unknown_fields`.
    """
    file, config = directory / CONFIG, checked_config(directory)
    peft_type = config["peft_type"]
    if peft_type not in known_types:
        raise AdapterError(
            f"{file}: unknown peft_type {peft_type!r} (known here: {listed(known_types)})", nearest(peft_type.upper(), known_types)
        )
    if peft_type in KNOWN:
        unknown = sorted(config.keys() - _COMMON - KNOWN[peft_type])
        active = [name for name in unknown if config[name] not in (None, False, "", [], {})]
        written = config.get("peft_version") or "an unknown version"
        if active and not allow_unknown_fields:
            raise AdapterError(
                f"{file} has fields that are not known here: {listed(active)} (written by peft {written}, known: peft {PEFT_VERSION})",
                "they may change what the tensors mean; load with allow_unknown_fields=True to ignore them",
            )
        if unknown:
            notes.append(f"fields of peft {written} that are ignored: {listed(unknown)}")
    return {name: value for name, value in config.items() if peft_type not in KNOWN or name in _COMMON | KNOWN[peft_type]}


def checked_config(directory: Path) -> dict[str, Any]:
    """Return the configuration in `directory`; AdapterError if a value is of a kind that peft does not write."""
    file = directory / CONFIG
    config = read_json(file)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{file}: the key 'peft_type' is {'missing' if 'peft_type' not in config else 'not a string'}")
    problems = [f"{name!r}{text}" for name, kind in _TYPES.items() if name in config for text, _ in wrong(kind, config[name])]
    if problems:
        raise AdapterError(f"{file}: {'; '.join(problems)}")
    return config


_Names = str | list[str] | None
_Flag, _Whole, _Number, _Word = bool | None, int | None, float | None, str | None
_TYPES: Mapping[str, Any] = {
    "target_modules": _Names, "exclude_modules": _Names, "feedforward_modules": _Names, "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None, "layers_pattern": _Names, 
    "rank_pattern": dict[str, float | list[bool]] | None, "alpha_pattern": dict[str, float] | None,
    "r": Count, "lora_alpha": float, "lora_dropout": float, "bias": Literal["none", "all", "lora_only"], "use_rslora": bool | None,
    "lora_bias": bool | None, "init_lora_weights": bool | str | None,
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "peft_version"), _Word),
    **dict.fromkeys(("inference_mode", "use_dora", "fan_in_fan_out", "ensure_weight_tying", "prefix_projection"), _Flag),
    **dict.fromkeys(("init_r", "target_r", "tinit", "tfinal", "deltaT", "num_virtual_tokens", "num_transformer_submodules"), _Whole),
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), _Number), "trainable_token_indices": list[int] | dict[str, list[int]] | None,
}  # fmt: skip


class Selection:
    """The modules of a model that a configuration selects, by peft's rules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.targets: str | list[str] | None = config.get("target_modules")
        self.exclude: str | list[str] = config.get("exclude_modules") or []
        self.to_save: list[str] = config.get("modules_to_save") or []
        layers = config.get("layers_to_transform")
        self.layers: list[int] = [layers] if isinstance(layers, int) else layers or []
        pattern = config.get("layers_pattern") or []
        self.layers_pattern: list[str] = [pattern] if isinstance(pattern, str) else pattern

    def is_target(self, path: str) -> bool:
        """True if the module at `path` is adapted; TargetError if an expression cannot be used."""
        if _matches(self.exclude, path) or any(f".{name}." in f".{path}." for name in self.to_save) or self.targets is None:
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return _matches(self.targets, path)
        return _matches(self.targets, path) and (not self.layers or self._layer(path) in self.layers)

    def is_saved(self, path: str) -> bool:
        """True if the module at `path` is trained whole: peft only asks that its path *ends* in the name."""
        return any(path.endswith(name) for name in self.to_save)

    def _layer(self, path: str) -> int | None:
        found = [re.match(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.", path) for name in self.layers_pattern]
        if not self.layers_pattern:
            found = [re.match(r".*?\.[^.]*\.(\d+)\.", path)]
        return next((int(match.group(1)) for match in found if match), None)


def _matches(selector: str | Iterable[str], path: str) -> bool:
    if isinstance(selector, str):
        return compile_pattern(selector).matches(path)
    return any(path == name or path.endswith(f".{name}") for name in selector)


def selected_by_ending(selector: str | Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return those ``feedforward_modules`` select in peft: by regular expression, or any end of a path, dot or not."""
    if isinstance(selector, str):
        pattern = compile_pattern(selector)
        return [path for path in paths if pattern.matches(path)]
    names = tuple(selector)
    return [path for path in paths if path.endswith(names)]


def write_targets(chosen: Collection[str], paths: Collection[str], to_save: list[str]) -> dict[str, Any]:
    """Return the shortest ``target_modules`` and ``exclude_modules`` that select exactly `chosen` among `paths`.

    Raises:
        AdapterError: peft's rules cannot express the choice (a target inside a module that is trained whole).
    """
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    whole = sorted(chosen)
    surplus = sorted(path for path in paths if _matches(whole, path) and path not in chosen)  # selected by their ending as well
    for targets, exclude in ((leaves, None), (whole, None), (whole, surplus)):
        config = {"target_modules": targets, "exclude_modules": exclude, "modules_to_save": to_save}
        selection = Selection(config)
        if {path for path in paths if selection.is_target(path)} == set(chosen):
            return {"target_modules": targets, "exclude_modules": exclude}
    raise AdapterError(f"peft's target_modules cannot express these sites: {listed(whole, 5)}")


def write_saved(chosen: Collection[str], paths: Collection[str]) -> list[str]:
    """Return ``modules_to_save`` that select exactly `chosen`: leaf names, or whole paths if those are ambiguous."""
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    for names in (leaves, sorted(chosen)):
        selection = Selection({"modules_to_save": names})
        if {path for path in paths if selection.is_saved(path)} == set(chosen):
            return names
    raise AdapterError(f"peft's modules_to_save cannot express {listed(chosen, 5)}: other modules' paths end in the same letters")
