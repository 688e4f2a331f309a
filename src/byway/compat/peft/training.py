"""peft's training helpers: preparing quantized models, optimizers for LoRA+, the base's own state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.session import find_session
from byway.core.adapter import adapters
from byway.core.slots import base_state_dict
from byway.core.weights import is_quantized
from byway.methods.lowrank.sides import LowRank

__all__ = [
    "create_loraplus_optimizer", "get_base_model_state_dict", "prepare_model_for_int8_training", "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
]  # fmt: skip


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


def get_base_model_state_dict(model: nn.Module, unwrap_compiled: bool = False) -> dict[str, Tensor]:
    """Return the base's tensors by the base's own names."""
    return base_state_dict(find_session(model).model)


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, unwrap_compiled: bool = False
) -> Any:
    """Load tensors by the base's own names into the base."""
    return find_session(model).model.load_state_dict(state_dict, strict=strict)
