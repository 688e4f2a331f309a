"""What is in an adapter's files, without its base: method, rank, coverage, size and health of every module's update.

The size of a low-rank update is ‖s·BA‖_F = s·√tr(BᵀB·AAᵀ), from the factors alone; other tensors are shown by their own norm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byway.base.fingerprint import Fingerprint
from byway.core.targets.resolve import pattern_value
from byway.disk.files import read_json, read_safetensors
from byway.errors import AdapterError, listed
from byway.formats.adapterhub import save as adapters_library
from byway.formats.directory import PREFIX, WEIGHTS, find_adapter
from byway.formats.peft.config import CONFIG
from byway.formats.record import read_record
from byway.methods.lowrank.sides import ConvLoRA, EmbeddingLoRA, LinearLoRA

__all__ = ["AdapterFacts", "ModuleFacts", "inspect_adapter"]

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")
_LOW_RANK = tuple({(names["lora_A"], names["lora_B"]): None for names in (c.peft_names for c in (LinearLoRA, EmbeddingLoRA, ConvLoRA))})
"""(name of A, name of B) below a module's path, for each kind of module."""


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module."""

    path: str
    rank: int | None
    """None where the module is not adapted by a low-rank update."""
    numbers: int
    norm: float
    """‖s·BA‖ of a low-rank update, else ‖tensors‖."""
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """Everything that an adapter's files say."""

    path: str
    format: str
    """``peft``, ``byway``, or ``adapters`` (the library of that name)."""
    method: str
    config: Mapping[str, Any]
    base: str
    """The base's name as it was recorded; ``""`` if it was not."""
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    """dtype → numbers in it."""
    ranks: Mapping[int, int]
    """rank → modules."""
    modules: tuple[ModuleFacts, ...]
    zero: tuple[str, ...]
    """Modules whose update is exactly zero, so that they change nothing."""
    broken: tuple[str, ...]
    """Tensors with NaN or infinity."""
    notes: tuple[str, ...]

    @property
    def largest(self) -> ModuleFacts:
        """The module with the largest update."""
        return max(self.modules, key=lambda m: -1.0 if math.isnan(m.norm) else m.norm)

    @property
    def smallest(self) -> ModuleFacts:
        """The module with the smallest update."""
        return min(self.modules, key=lambda m: math.inf if math.isnan(m.norm) else m.norm)

    def coverage(self) -> list[tuple[str, int, str, str, int, float, float]]:
        """Rows (modules that differ in their layer's number only, how many, which layers, ranks, numbers, smallest and largest norm)."""
        groups: dict[str, list[ModuleFacts]] = {}
        for module in self.modules:
            groups.setdefault(_INDEX.sub(".*", f".{module.path}")[1:], []).append(module)
        rows = []
        for name, group in groups.items():
            layers = sorted({int(found[1]) for m in group if (found := _INDEX.search(f".{m.path}"))})
            ranks = listed({str(m.rank) for m in group if m.rank is not None}, 4)
            norms = [m.norm for m in group]
            rows.append((name, len(group), _ranges(layers), ranks, sum(m.numbers for m in group), min(norms), max(norms)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; a number that is not finite is null."""
        return _json(asdict(self))


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    return [_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterFacts:
    """What the adapter in the directory `path` is. Raises AdapterError for files that cannot be read."""
    directory = find_adapter(Path(path))
    is_peft = (directory / CONFIG).is_file()
    config_file = directory / CONFIG if is_peft else next(iter(sorted(directory.glob("*.json"))))
    config = read_json(config_file)
    is_library = is_peft and adapters_library.is_config(config)
    name = adapters_library.WEIGHTS if is_library else WEIGHTS
    weights = directory / name if is_peft else next(iter(sorted(directory.glob("*.safetensors"))), directory / WEIGHTS)
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing", f"there are: {listed(entry.name for entry in directory.iterdir())}")
    tensors, metadata = read_safetensors(weights)
    if not tensors:
        raise AdapterError(f"{weights} holds no tensor: it is an empty adapter", "was it saved under a sharded optimizer?")
    record = read_record(metadata, tensors, weights)
    modules = _modules(tensors, config)
    broken = tuple(name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all())
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + tensor.numel()
    ranks = [m.rank for m in modules if m.rank is not None]
    return AdapterFacts(
        path=os.fspath(path),
        format="adapters" if is_library else "peft" if is_peft else "byway",
        method=str(config.get("peft_type") or config.get("method") or ("bottleneck" if is_library else "?")),
        config={key: value for key, value in sorted(config.items()) if value not in (None, False, [], {}, "")},
        base=str(config.get("base_model_name_or_path") or ""),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file()),
        dtypes=dtypes,
        ranks={rank: ranks.count(rank) for rank in sorted(set(ranks))},
        modules=modules,
        zero=tuple(m.path for m in modules if m.norm == 0.0),
        broken=broken,
        notes=_notes(record),
    )


def _modules(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ModuleFacts, ...]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, name = _split(key.removeprefix(PREFIX))
        groups.setdefault(path, {})[name] = tensor
    return tuple(_facts(path, group, config) for path, group in groups.items())


def _split(key: str) -> tuple[str, str]:
    """(module path, the tensor's name below it)."""
    for names in _LOW_RANK:
        for name in (*names, f"{names[1].removesuffix('.weight')}.bias"):
            if key.endswith(f".{name}"):
                return key.removesuffix(f".{name}"), name
    path, _, name = key.rpartition(".")
    return path or key, name


def _facts(path: str, group: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModuleFacts:
    numbers = sum(t.numel() for t in group.values())
    for a_name, b_name in _LOW_RANK:
        if a_name in group and b_name in group:
            a, b = group[a_name].double().flatten(1), group[b_name].double().flatten(1)
            norm = _scale(path, a.shape[0], config) * _product_norm(a, b) if a.shape[0] == b.shape[1] else math.nan
            return ModuleFacts(path, a.shape[0], numbers, norm, tuple(group))
    squared = sum(float(t.double().square().sum()) for t in group.values())
    return ModuleFacts(path, None, numbers, math.sqrt(squared), tuple(group))


def _product_norm(a: Tensor, b: Tensor) -> float:
    """‖BA‖_F for A (r, in) and B (out, r), by products of rank size; exact zeros stay zero."""
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = float(pattern_value(path, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _notes(record: Fingerprint | None) -> tuple[str, ...]:
    if record is None:
        return ("no fingerprint of its base: whether a base is the right one can only be told by shapes",)
    kinds = sorted({matrix.kind for matrix in record.matrices.values()})
    model = record.architecture.get("model_type") or "a model without configuration"
    notes = [f"made on {model}, {len(record.matrices)} matrices kept as {', '.join(kinds)}; loading checks that the base is that one"]
    if record.tokenizer is None:
        notes.append("no tokenizer was recorded")
    return tuple(notes)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
