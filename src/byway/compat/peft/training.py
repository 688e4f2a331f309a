"""peft's helpers around training: preparing quantized models, LoRA+ optimizers, the base's own state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.files import find_session
from byway.core.adapter import adapters
from byway.core.slots import base_state_dict
from byway.core.weights import is_quantized
from byway.methods.lowrank.sides import LowRank

__all__ = [
    "create_loraplus_optimizer",
    "get_base_model_state_dict",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
]


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze the model, keep what is in half precision and not quantized in float32, and let gradients enter a checkpointed model.

    On a model that is not quantized only the freezing and the checkpointing are done.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    quantized = [module for module in model.modules() if is_quantized(module)]
    if quantized:
        packed = {id(module.weight) for module in quantized}
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in packed:
                parameter.data = parameter.data.to(torch.float32)
    if quantized and use_gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {})
    return model


def prepare_model_for_int8_training(model: Any, use_gradient_checkpointing: bool = True, **_: Any) -> Any:
    """The name that older examples use for :func:`prepare_model_for_kbit_training`."""
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, loraplus_lr_embedding: float = 1e-6, **kwargs: Any
) -> torch.optim.Optimizer:
    """LoRA+: every B learns `loraplus_lr_ratio` times faster than A, an embedding's factors with a rate of their own.

    Parameters of normalizations and biases are not decayed. Source: Hayou et al., arXiv 2402.12354.
    """
    session = find_session(model)
    decay = kwargs.pop("loraplus_weight_decay", kwargs.pop("weight_decay", 0.0))
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    undecayed: set[int] = set()
    for adapter in adapters(session.model).values():
        for _, side in adapter.side_paths():
            for name, parameter in side.named_parameters():
                if not parameter.requires_grad:
                    continue
                kind = side.peft_names.get(name, "") if isinstance(side, LowRank) else ""
                group = embedding if kind.startswith("lora_embedding") else fast if name in ("lora_B", "lora_bias") else slow
                group.append(parameter)
                if parameter.dim() < 2 and name != "lora_B":
                    undecayed.add(id(parameter))
    groups = []
    for parameters, rate in ((slow, lr), (embedding, loraplus_lr_embedding), (fast, lr * loraplus_lr_ratio)):
        for decayed in (True, False):
            own = [p for p in parameters if (id(p) not in undecayed) == decayed]
            groups.append({"params": own, "weight_decay": decay if decayed else 0.0, "lr": rate})
    return optimizer_cls([group for group in groups if group["params"]], **kwargs)


def get_base_model_state_dict(model: nn.Module, unwrap_compiled: bool = False) -> dict[str, Tensor]:
    """The base's tensors by its own names."""
    return base_state_dict(find_session(vars(model).get("_orig_mod", model) if unwrap_compiled else model).model)


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, unwrap_compiled: bool = False
) -> Any:
    """Load tensors by the base's own names into the base."""
    return find_session(vars(model).get("_orig_mod", model) if unwrap_compiled else model).model.load_state_dict(state_dict, strict=strict)
