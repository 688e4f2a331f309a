"""Adapters as state dicts and as directories, in peft's names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byway.compat.peft.config import LoraConfig, PeftConfig
from byway.compat.peft.session import Session, session_of
from byway.core.adapter import Adapter, adapters
from byway.core.slots import base_modules
from byway.core.weights import dense
from byway.disk.files import atomic_write_text, write_safetensors
from byway.errors import AdapterError, listed
from byway.formats.directory import README, WEIGHTS
from byway.formats.peft.save import key_of
from byway.formats.record import destinations
from byway.methods.lowrank.sides import LowRank

__all__ = ["IncompatibleKeys", "adapter_state", "fill_adapter", "get_peft_model_state_dict", "save", "set_peft_model_state_dict"]

_VOCABULARY = ("embed_tokens", "lm_head")


class IncompatibleKeys(NamedTuple):
    """What a state dict lacks and what it has too much."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def find_session(model: nn.Module) -> Session:
    """The session of a peft model or of a model that an adapter was injected into."""
    found = session_of(model)
    if found is None:
        found = next((s for _, module in base_modules(model) if (s := session_of(module)) is not None), None)
    if found is None:
        raise AdapterError(f"{type(model).__name__} has no adapter of peft's interface", "get_peft_model or inject_adapter_in_model first")
    return found


def adapter_state(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names in files (without the adapter's name)."""
    hung = adapter.side_paths()
    return adapter.method.to_peft_tensors(
        {key_of(site.path, name): tensor for site, side in hung for name, tensor in side.export().items()}
    )


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
    **_: Any,
) -> dict[str, Tensor]:
    """The tensors of one adapter by the names that peft writes into files.

    save_embedding_layers: also the base's embedding and head where they are targets (``auto``), always, or never.
    """
    if state_dict is not None:
        raise AdapterError("state_dict: a state dict of one's own cannot be filtered here", "leave it out: the model's own is used")
    session = find_session(vars(model).get("_orig_mod", model) if unwrap_compiled else model)
    session.known(adapter_name)
    found = adapter_state(adapters(session.model)[adapter_name])
    return found | _vocabulary(session, adapter_name, save_embedding_layers)


def _vocabulary(session: Session, name: str, wanted: bool | str) -> dict[str, Tensor]:
    targets = vars(session.configs[name]).get("target_modules") or ()
    named = targets if isinstance(targets, str) else " ".join(targets)
    chosen = any(word in named for word in _VOCABULARY)
    if not wanted or (wanted == "auto" and not chosen):
        return {}
    if wanted == "auto":
        warnings.warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4)
    adapted = {site.path for site, _ in adapters(session.model)[name].side_paths()}
    found = {}
    for path, module in base_modules(session.model):
        if path.rpartition(".")[2] in _VOCABULARY:
            found[key_of(path, "base_layer.weight" if path in adapted else "weight")] = dense(module)
    return found


def fill_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor], *, ignore_mismatched: bool = False) -> IncompatibleKeys:
    """Copy `tensors` into adapter `name`; what does not fit by shape is an error, what is missing or too much is returned."""
    places: dict[str, Tensor] = {}
    adapter = adapters(model)[name]
    for site, side in adapter.side_paths():
        places |= {key_of(site.path, own): tensor for own, tensor in destinations(side).items()}
    places = adapter.method.to_peft_tensors(places)
    unexpected = [key for key in tensors if key not in places]
    with torch.no_grad():
        for key, place in places.items():
            if key not in tensors:
                continue
            if tensors[key].shape != place.shape:
                if ignore_mismatched:
                    warnings.warn(
                        f"{key} is left as it is: the file has {list(tensors[key].shape)}, here it is {list(place.shape)}", stacklevel=3
                    )
                    continue
                raise RuntimeError(f"size mismatch for {key}: the file has {list(tensors[key].shape)}, here it is {list(place.shape)}")
            place.copy_(tensors[key])
    return IncompatibleKeys([key for key in places if key not in tensors], unexpected)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Copy tensors by peft's names into one adapter; returns what was missing and what was unexpected."""
    session = find_session(model)
    session.known(adapter_name)
    return fill_adapter(session.model, adapter_name, peft_model_state_dict, ignore_mismatched=ignore_mismatched_sizes)


def save(session: Session, name: str, directory: Path, *, save_embedding_layers: bool | str = "auto", task_type: Any = None) -> None:
    """Write adapter `name` into `directory`, each file in one step; other files there (a trainer's checkpoint) stay."""
    adapter, config = adapters(session.model)[name], session.configs[name]
    tensors = {k: v.detach().contiguous() for k, v in adapter_state(adapter).items()}
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"adapter {name!r} holds NaN or infinity, in {listed(broken, 5)}", "load an earlier checkpoint")
    tensors |= {k: v.detach().clone() for k, v in _vocabulary(session, name, save_embedding_layers).items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS, tensors, {"format": "pt"})
    fields = _fields(adapter, config, session.model)
    atomic_write_text(directory / "adapter_config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if not (directory / README).exists():
        atomic_write_text(directory / README, _card(config, base_name(session.model)))


def _fields(adapter: Adapter, config: PeftConfig, model: nn.Module) -> dict[str, Any]:
    """The configuration's fields as they describe the tensors that are written."""
    fields = config.to_dict() | {"inference_mode": True}
    if fields.get("base_model_name_or_path") is None:
        fields["base_model_name_or_path"] = base_name(model)
    derived = adapter.method.peft_fields(adapter.side_paths(), adapter.method.to_peft() | fields)
    fields |= {k: v for k, v in derived.items() if k in fields and (v is not None or fields[k] is None)}
    pairs = {site.path: side for site, side in adapter.side_paths() if isinstance(side, LowRank)}
    if isinstance(config, LoraConfig) and any(side.exported_rank != side.rank for side in pairs.values()):
        from byway.formats.peft.save import exactly

        first = next(iter(pairs.values()))
        fields |= {"r": first.exported_rank, "lora_alpha": first.exported_alpha, "init_lora_weights": True}
        fields["rank_pattern"] = {exactly(p): s.exported_rank for p, s in pairs.items() if s.exported_rank != first.exported_rank}
        fields["alpha_pattern"] = {exactly(p): s.exported_alpha for p, s in pairs.items() if s.exported_alpha != first.exported_alpha}
    return fields


def base_name(model: nn.Module) -> str | None:
    """Where the base was loaded from, as transformers recorded it."""
    config: Any = vars(model).get("config")
    recorded = None if config is None else vars(config).get("_name_or_path")
    return recorded if isinstance(recorded, str) and recorded else None


def _card(config: PeftConfig, base: str | None) -> str:
    tags = [f"base_model:adapter:{base}"] if base else []
    tags += ["lora"] if isinstance(config, LoraConfig) else []
    head = [
        *([f"base_model: {base}"] if base else []),
        "library_name: peft",
        *(["tags:"] if tags else []),
        *(f"- {json.dumps(t)}" for t in tags),
    ]
    return "\n".join(["---", *head, "---", "", f"# {config.peft_type} adapter" + (f" for {base}" if base else ""), ""])
