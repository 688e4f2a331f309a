"""Adapters as state dicts and directories, with peft's names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byway.compat.peft.config import LoraConfig
from byway.compat.peft.session import Session, find_session, tensors_of
from byway.core.adapter import adapters
from byway.core.slots import base_modules
from byway.core.weights import dense
from byway.disk.files import atomic_write_text, write_safetensors
from byway.errors import AdapterError, listed
from byway.formats.directory import README
from byway.formats.peft.config import CONFIG, WEIGHTS, peft_format
from byway.formats.peft.save import exactly, key_of
from byway.methods.lowrank.sides import LowRank

__all__ = ["IncompatibleKeys", "base_name", "get_peft_model_state_dict", "save", "set_peft_model_state_dict"]

_VOCABULARY = ("embed_tokens", "lm_head")


class IncompatibleKeys(NamedTuple):
    """The keys that a state dict lacks, and those that do not belong."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
    **_: Any,
) -> dict[str, Tensor]:
    """Return the tensors of one adapter by their names in peft's files.

    save_embedding_layers: also return the base's embedding and head: if they are targets (``auto``), always, or never.
    """
    if state_dict is not None:
        raise AdapterError("state_dict: Byway cannot filter a given state dict", "leave it out to use the model's own")
    session = find_session(model)
    session.check_adapter(adapter_name)
    adapter = adapters(session.model)[adapter_name]
    exported = {key_of(site.path, name): tensor for site, side in adapter.side_paths() for name, tensor in side.export().items()}
    found = peft_format(adapter.method).to_file(exported)
    targets = vars(session.peft_config[adapter_name]).get("target_modules") or ()
    named = targets if isinstance(targets, str) else " ".join(targets)
    if save_embedding_layers == "auto":
        save_embedding_layers = any(word in named for word in _VOCABULARY)
        if save_embedding_layers:
            warnings.warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3)
    adapted = {site.path for site, _ in adapter.side_paths()}
    for path, module in base_modules(session.model) if save_embedding_layers else ():
        if path.rpartition(".")[2] in _VOCABULARY:
            found[key_of(path, "base_layer.weight" if path in adapted else "weight")] = dense(module)
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Copy tensors by peft's names into one adapter, and return the missing and the unexpected keys.

    Raises:
        RuntimeError: a tensor has another shape; with `ignore_mismatched_sizes` it is skipped with a warning.
    """
    session = find_session(model)
    session.check_adapter(adapter_name)
    own, given = tensors_of(adapters(session.model)[adapter_name]), dict(peft_model_state_dict)
    for key in [key for key in own if key in given]:
        if given[key].shape == own[key].shape:
            with torch.no_grad():
                own[key].copy_(given[key])
            continue
        problem = f"size mismatch for {key}: the state dict has {list(given[key].shape)}, the model {list(own[key].shape)}"
        if not ignore_mismatched_sizes:
            raise RuntimeError(problem)
        warnings.warn(f"{problem}; it is skipped", stacklevel=2)
    return IncompatibleKeys([key for key in own if key not in given], [key for key in given if key not in own])


def save(session: Session, name: str, directory: Path, *, save_embedding_layers: bool | str = "auto") -> None:
    """Write adapter `name` into `directory`, each file atomically. Other files there (a trainer's checkpoint) are kept.

    Raises:
        AdapterError: a tensor is not finite.
    """
    adapter, config = adapters(session.model)[name], session.peft_config[name]
    tensors = get_peft_model_state_dict(session.model, adapter_name=name, save_embedding_layers=save_embedding_layers)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"adapter {name!r} holds NaN or infinity, in {listed(broken, 5)}", "load an earlier checkpoint")
    base = base_name(session.model)
    written = config.to_dict() | {"inference_mode": True}
    if written.get("base_model_name_or_path") is None:
        written["base_model_name_or_path"] = base
    peft = peft_format(adapter.method)
    derived = peft.site_fields(adapter.method, adapter.side_paths(), peft.fields(adapter.method) | written)
    written |= {key: value for key, value in derived.items() if key in written and (value is not None or written[key] is None)}
    pairs = {site.path: side for site, side in adapter.side_paths() if isinstance(side, LowRank)}
    if isinstance(config, LoraConfig) and any(side.exported_rank != side.rank for side in pairs.values()):
        # PiSSA and OLoRA: the file holds the plain LoRA of rank 2r
        first = next(iter(pairs.values()))
        written |= {"r": first.exported_rank, "lora_alpha": first.exported_alpha, "init_lora_weights": True}
        written["rank_pattern"] = {exactly(p): s.exported_rank for p, s in pairs.items() if s.exported_rank != first.exported_rank}
        written["alpha_pattern"] = {exactly(p): s.exported_alpha for p, s in pairs.items() if s.exported_alpha != first.exported_alpha}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    write_safetensors(directory / WEIGHTS, tensors, {"format": "pt"})
    atomic_write_text(directory / CONFIG, json.dumps(written, indent=2, sort_keys=True) + "\n")
    if not (directory / README).exists():
        tags = [f"base_model:adapter:{base}"] if base else []
        tags += ["lora"] if isinstance(config, LoraConfig) else []
        head = [f"base_model: {base}"] if base else []
        head += ["library_name: peft", *(["tags:"] if tags else []), *(f"- {json.dumps(tag)}" for tag in tags)]
        title = f"# {config.peft_type} adapter" + (f" for {base}" if base else "")
        atomic_write_text(directory / README, "\n".join(["---", *head, "---", "", title, ""]))


def base_name(model: nn.Module) -> str | None:
    """Return where the base was loaded from, as transformers recorded it."""
    config: Any = vars(model).get("config")
    recorded = None if config is None else vars(config).get("_name_or_path")
    return recorded if isinstance(recorded, str) and recorded else None
