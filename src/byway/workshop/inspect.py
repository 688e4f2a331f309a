"""Describe an adapter from its files, without its base: method, rank, coverage, and norms of the updates.

The norm of a low-rank update is ‖s·BA‖_F = s·√tr(BᵀB·AAᵀ), computed from the factors. For other tensors it is their own
norm.
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

from byway.core.disk.files import finite_json, read_safetensors
from byway.core.targets.resolve import pattern_value
from byway.errors import AdapterError, listed
from byway.formats import format_of
from byway.formats.directory import find_adapter
from byway.formats.peft.config import PREFIX
from byway.formats.record import read_record
from byway.methods.lowrank.sides import ConvLoRA, EmbeddingLoRA, LinearLoRA

__all__ = ["AdapterFacts", "ModuleFacts", "inspect_adapter"]

_INDEX = re.compile(r"\.(\d{1,9})(?=\.|$)")
_LOW_RANK = tuple({(names["lora_A"], names["lora_B"]): None for names in (c.peft_names for c in (LinearLoRA, EmbeddingLoRA, ConvLoRA))})
"""(name of A, name of B) below a module's path, for each kind of module."""


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module."""

    path: str
    rank: int | None
    """None if the update is not low-rank."""
    numbers: int
    """Number of parameters."""
    norm: float
    """‖s·BA‖ of a low-rank update, else ‖tensors‖."""
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """Everything that an adapter's files tell about it."""

    path: str
    format: str
    """``peft``, ``byway``, or ``adapters`` (the library of that name)."""
    method: str
    config: Mapping[str, Any]
    base: str
    """Recorded name of the base; ``""`` if there is none."""
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    """dtype → number of parameters."""
    ranks: Mapping[int, int]
    """rank → number of modules."""
    modules: tuple[ModuleFacts, ...]
    zero: tuple[str, ...]
    """Modules whose update is exactly zero, so that they have no effect."""
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
        """Group modules that differ only in their layer index.

        Returns rows (name, number of modules, layers, ranks, parameters, smallest and largest norm).
        """
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
        """Return everything as JSON values. NaN and infinity become null."""
        return finite_json(asdict(self))


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterFacts:
    """Describe the adapter in the directory `path`. Raises AdapterError if its files cannot be read."""
    directory = find_adapter(Path(path))
    chosen = format_of(directory)
    config, weights = chosen.read_config(directory), directory / chosen.files[1]
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing", f"there are: {listed(entry.name for entry in directory.iterdir())}")
    tensors, metadata = read_safetensors(weights)
    if not tensors:
        raise AdapterError(f"{weights} holds no tensor: the adapter is empty", "was it saved under a sharded optimizer?")
    record = read_record(metadata, tensors, weights)
    if record is None:
        notes = ["no fingerprint of its base: whether a base is the right one can only be checked by shapes"]
    else:
        kinds = sorted({matrix.kind for matrix in record.matrices.values()})
        model = record.architecture.get("model_type") or "a model without configuration"
        notes = [f"trained on {model}: {len(record.matrices)} matrices stored as {', '.join(kinds)}; loading checks that the base matches"]
        notes += ["no tokenizer was recorded"] if record.tokenizer is None else []
    groups: dict[str, dict[str, Tensor]] = {}
    dtypes: dict[str, int] = {}
    for key, tensor in tensors.items():
        module, name = _split(key.removeprefix(PREFIX))
        groups.setdefault(module, {})[name] = tensor
        kind = str(tensor.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + tensor.numel()
    modules = tuple(_facts(module, group, config) for module, group in groups.items())
    ranks = [m.rank for m in modules if m.rank is not None]
    return AdapterFacts(
        path=os.fspath(path),
        format=chosen.label,
        method=str(config.get("peft_type") or config.get("method") or ("bottleneck" if chosen.label == "adapters" else "?")),
        config={key: value for key, value in sorted(config.items()) if value not in (None, False, [], {}, "")},
        base=str(config.get("base_model_name_or_path") or ""),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=sum(entry.stat().st_size for entry in directory.iterdir() if entry.is_file()),
        dtypes=dtypes,
        ranks={rank: ranks.count(rank) for rank in sorted(set(ranks))},
        modules=modules,
        zero=tuple(m.path for m in modules if m.norm == 0.0),
        broken=tuple(name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()),
        notes=tuple(notes),
    )


def _split(key: str) -> tuple[str, str]:
    """Split a tensor's name into (module path, name below it)."""
    for names in _LOW_RANK:
        for name in (*names, f"{names[1].removesuffix('.weight')}.bias"):
            if key.endswith(f".{name}"):
                return key.removesuffix(f".{name}"), name
    path, _, name = key.rpartition(".")
    return path or key, name


def _facts(path: str, group: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModuleFacts:
    numbers = sum(t.numel() for t in group.values())
    for a_name, b_name in _LOW_RANK:
        factors = [group[name] for name in (a_name, b_name) if name in group]
        if len(factors) == 2 and all(factor.ndim > 1 and factor.is_floating_point() for factor in factors):
            a, b = (factor.double().flatten(1) for factor in factors)  # (r, in), (out, r)
            rank, norm = a.shape[0], math.nan
            if rank == b.shape[1]:
                alpha = float(pattern_value(path, config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)))
                squared = float(((b.T @ b) * (a @ a.T)).sum())
                size = math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan
                norm = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * size
            return ModuleFacts(path, rank, numbers, norm, tuple(group))
    squared = sum(float((torch.view_as_real(t) if t.is_complex() else t).double().square().sum()) for t in group.values())
    return ModuleFacts(path, None, numbers, math.sqrt(squared), tuple(group))


def _ranges(numbers: list[int]) -> str:
    """Format [0, 1, 2, 5] as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
