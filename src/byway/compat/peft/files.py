"""peft's functions on a model: state dicts, directories, preparing quantized models, optimizers for LoRA+."""

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
from byway.core.disk.files import atomic_write_text, read_safetensors, write_safetensors
from byway.core.slots import base_modules, base_state_dict
from byway.core.weights import dense, is_quantized
from byway.errors import AdapterError, listed
from byway.formats.directory import README
from byway.formats.peft.config import CONFIG, WEIGHTS, peft_format
from byway.formats.peft.save import exactly, key_of
from byway.formats.record import base_name, check_tensors, fill
from byway.methods.lowrank.sides import LowRank

__all__ = [
    "IncompatibleKeys", "create_loraplus_optimizer", "get_base_model_state_dict", "get_peft_model_state_dict",
    "prepare_model_for_int8_training", "prepare_model_for_kbit_training", "restore", "save", "set_base_model_state_dict",
    "set_peft_model_state_dict", "write_card",
]  # fmt: skip

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
    targeted = any(word in named for word in _VOCABULARY)
    if save_embedding_layers == "auto":
        save_embedding_layers = targeted
        if save_embedding_layers:
            warnings.warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3)
    adapted = {site.path for site, _ in adapter.side_paths()}
    for path, module in base_modules(session.model) if save_embedding_layers else ():
        # as in peft: if one of them is a target, the other, perhaps tied to it, is left out
        if path.rpartition(".")[2] in _VOCABULARY and (path in adapted or not targeted):
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


def restore(session: Session, name: str, directory: Path) -> None:
    """Copy the tensors of a directory into adapter `name`, which is attached: a trainer resumes from a checkpoint.

    The files of PiSSA and OLoRA hold factors of rank 2r, ``[A; A₀]`` and ``[B, −B₀]``: A and B are taken from them.

    Raises:
        AdapterError: a tensor has no place or another shape, or an expected one is missing; nothing is changed.
    """
    adapter = adapters(session.model)[name]
    expected, (tensors, _) = tensors_of(adapter), read_safetensors(directory / WEIGHTS)
    for site, side in adapter.side_paths():
        if isinstance(side, LowRank) and side.exported_rank != side.rank:
            exported = side.export()
            for key, own in ((key_of(site.path, part), tensor) for part, tensor in exported.items()):
                if key in tensors and tensors[key].shape == own.shape and own.shape != expected[key].shape:
                    tensors[key] = tensors[key][tuple(slice(size) for size in expected[key].shape)]
    vocabulary = [key for key in tensors if key.rpartition(".")[2] == "weight" and key.split(".")[-2] in (*_VOCABULARY, "base_layer")]
    check_tensors(expected, tensors, directory / WEIGHTS, extra=vocabulary)
    fill(expected, tensors)


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
    write_card(session, name, directory)


def write_card(session: Session, name: str, directory: Path) -> None:
    """Write a model card for adapter `name` into `directory`, unless there is one."""
    base, config = base_name(session.model), session.peft_config[name]
    if not (directory / README).exists():
        tags = [f"base_model:adapter:{base}"] if base else []
        tags += ["lora"] if isinstance(config, LoraConfig) else []
        head = [f"base_model: {base}"] if base else []
        head += ["library_name: peft", *(["tags:"] if tags else []), *(f"- {json.dumps(tag)}" for tag in tags)]
        title = f"# {config.peft_type} adapter" + (f" for {base}" if base else "")
        atomic_write_text(directory / README, "\n".join(["---", *head, "---", "", title, ""]))


def get_base_model_state_dict(model: nn.Module, unwrap_compiled: bool = False) -> dict[str, Tensor]:
    """Return the base's tensors by the base's own names."""
    return base_state_dict(find_session(model).model)


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, unwrap_compiled: bool = False
) -> Any:
    """Load tensors by the base's own names into the base."""
    return find_session(model).model.load_state_dict(state_dict, strict=strict)


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze the model. If it is quantized, cast its other half-precision parameters to float32 and checkpoint it."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    packed = {id(module.weight) for module in model.modules() if is_quantized(module)}
    if packed:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in packed:
                parameter.data = parameter.data.to(torch.float32)
        if use_gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {})
    return model


def prepare_model_for_int8_training(model: Any, use_gradient_checkpointing: bool = True, **_: Any) -> Any:
    """Call :func:`prepare_model_for_kbit_training`; older examples use this name."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, loraplus_lr_embedding: float = 1e-6, **kwargs: Any
) -> torch.optim.Optimizer:
    """Create an optimizer for LoRA+: B has `loraplus_lr_ratio` times A's learning rate, embeddings have their own.

    Vectors (norms, biases) have no weight decay. Source: Hayou et al., arXiv 2402.12354.
    """
    decay = kwargs.pop("loraplus_weight_decay", kwargs.pop("weight_decay", 0.0))
    groups = [
        {"params": [], "weight_decay": weight_decay, "lr": rate}
        for rate in (lr, loraplus_lr_embedding, lr * loraplus_lr_ratio)
        for weight_decay in (decay, 0.0)
    ]
    for adapter in adapters(find_session(model).model).values():
        for _, side in adapter.side_paths():
            for name, parameter in side.named_parameters():
                peft_name = side.peft_names.get(name, "") if isinstance(side, LowRank) else ""
                rate = 1 if peft_name.startswith("lora_embedding") else 2 if name in ("lora_B", "lora_bias") else 0
                if parameter.requires_grad:
                    groups[2 * rate + (parameter.dim() < 2 and name != "lora_B")]["params"].append(parameter)
    return optimizer_cls([group for group in groups if group["params"]], **kwargs)
