"""``adapter_config.json`` as HF peft writes it: which fields there are, what they select in a model, and how a selection is written.

Matching follows peft: a string is a regular expression for the whole path; a list entry is a path or its end from a dot on; excluded
modules and those trained whole (``modules_to_save``) are never targets; ``layers_to_transform`` looks at the first number in the path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from byway.core.targets.patterns import compile_pattern
from byway.disk.files import read_json
from byway.errors import AdapterError, listed, nearest

__all__ = ["CONFIG", "KNOWN", "PEFT_VERSION", "Selection", "read_config", "selected_by_ending", "write_saved", "write_targets"]

CONFIG = "adapter_config.json"
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
"""peft_type → the fields of its configuration, beside those that all have."""


def read_config(directory: Path, known_types: Collection[str], *, allow_unknown_fields: bool, notes: list[str]) -> dict[str, Any]:
    """The configuration in `directory`, checked: a known ``peft_type`` and no field of a newer peft that is switched on.

    Unknown fields that are off (null, false, empty) are noted; others too with `allow_unknown_fields`, else they are an AdapterError.
    """
    file = directory / CONFIG
    config = read_json(file)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterError(f"{file}: the key 'peft_type' is {'missing' if 'peft_type' not in config else 'not a string'}")
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
    _check_types(file, config)
    return {name: value for name, value in config.items() if peft_type not in KNOWN or name in _COMMON | KNOWN[peft_type]}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)


def _is_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int | float | list) for number in value.values())


_SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": ("a string or a list of strings", lambda v: isinstance(v, str) or _is_names(v)),
    "exclude_modules": ("a string or a list of strings", lambda v: isinstance(v, str) or _is_names(v)),
    "feedforward_modules": ("a string or a list of strings", lambda v: isinstance(v, str) or _is_names(v)),
    "modules_to_save": ("a list of strings", _is_names),
    "layers_to_transform": ("a number or a list of numbers", lambda v: isinstance(v, int) or all(isinstance(i, int) for i in v)),
    "layers_pattern": ("a string or a list of strings", lambda v: isinstance(v, str) or _is_names(v)),
    "rank_pattern": ("a mapping to numbers", _is_patterns),
    "alpha_pattern": ("a mapping to numbers", _is_patterns),
    "r": ("a whole number of at least 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "lora_alpha": ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    "lora_dropout": ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "lora_bias": ("true or false", lambda v: isinstance(v, bool)),
    "trainable_token_indices": ("a list of numbers, or lists by name", lambda v: _is_indices(v) or all(map(_is_indices, v.values()))),
}
_NEVER_NULL = {"r", "lora_alpha", "lora_dropout", "bias"}


def _check_types(file: Path, config: Mapping[str, Any]) -> None:
    wrong = []
    for name, (expected, fits) in _SHAPES.items():
        if name not in config or (config[name] is None and name not in _NEVER_NULL):
            continue
        value = config[name]
        try:
            good = fits(value)
        except (TypeError, AttributeError):
            good = False
        if not good:
            wrong.append(f"{name!r} is {value!r}; it must be {expected}")
    if wrong:
        raise AdapterError(f"{file}: {'; '.join(wrong)}")


class Selection:
    """What a configuration selects among the modules of a model, by peft's rules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.targets: str | list[str] | None = config.get("target_modules")
        self.exclude: str | list[str] = config.get("exclude_modules") or []
        self.to_save: list[str] = config.get("modules_to_save") or []
        layers = config.get("layers_to_transform")
        self.layers: list[int] = [layers] if isinstance(layers, int) else layers or []
        pattern = config.get("layers_pattern") or []
        self.layers_pattern: list[str] = [pattern] if isinstance(pattern, str) else pattern

    def is_target(self, path: str) -> bool:
        """Whether the module at `path` is adapted; TargetError if an expression cannot be used."""
        if _matches(self.exclude, path) or self._inside_saved(path) or self.targets is None:
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return _matches(self.targets, path)
        return _matches(self.targets, path) and (not self.layers or self._layer(path) in self.layers)

    def is_saved(self, path: str) -> bool:
        """Whether the module at `path` is trained whole: peft asks only that its path *ends* in the name."""
        return any(path.endswith(name) for name in self.to_save)

    def _inside_saved(self, path: str) -> bool:
        return any(f".{name}." in f".{path}." for name in self.to_save)

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
    """Those of `paths` that peft takes for ``feedforward_modules``: a string is an expression, a name any end of a path, dot or not."""
    if isinstance(selector, str):
        pattern = compile_pattern(selector)
        return [path for path in paths if pattern.matches(path)]
    names = tuple(selector)
    return [path for path in paths if path.endswith(names)]


def write_targets(chosen: Collection[str], paths: Collection[str], to_save: list[str]) -> dict[str, Any]:
    """``target_modules`` and ``exclude_modules`` that select exactly `chosen` among `paths`, as briefly as possible.

    Raises:
        AdapterError: peft's rules cannot express the choice (a target inside a module that is trained whole).
    """
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    whole = sorted(chosen)
    for targets, exclude in ((leaves, None), (whole, None), (whole, _surplus(whole, chosen, paths))):
        config = {"target_modules": targets, "exclude_modules": exclude, "modules_to_save": to_save}
        selection = Selection(config)
        if {path for path in paths if selection.is_target(path)} == set(chosen):
            return {"target_modules": targets, "exclude_modules": exclude}
    raise AdapterError(f"peft's target_modules cannot express these sites: {listed(whole, 5)}")


def write_saved(chosen: Collection[str], paths: Collection[str]) -> list[str]:
    """``modules_to_save`` that peft takes for exactly `chosen` among `paths`: leaf names, or whole paths where those are ambiguous."""
    leaves = sorted({path.rpartition(".")[2] for path in chosen})
    for names in (leaves, sorted(chosen)):
        selection = Selection({"modules_to_save": names})
        if {path for path in paths if selection.is_saved(path)} == set(chosen):
            return names
    raise AdapterError(f"peft's modules_to_save cannot express {listed(chosen, 5)}: other modules' paths end in the same letters")


def _surplus(targets: list[str], chosen: Collection[str], paths: Iterable[str]) -> list[str]:
    """What suffix matching would select beside `chosen`."""
    return sorted(path for path in paths if _matches(targets, path) and path not in chosen)
