"""The importance of each weight of the backbone: its magnitude, or its empirical Fisher information.

Fisher information: Σ (∂ loss / ∂ w)² over the rows of the calibration batches, one row at a time (Sung et al., arXiv
2206.06522 §3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.modes import evaluating
from byway.core.weights import dense, is_quantized
from byway.errors import ConfigError

__all__ = ["Importance", "fisher", "magnitude"]


Importance = Callable[[nn.Module], Tensor]
"""Module → importance of each entry of its weight, in the weight's own layout."""


def magnitude(module: nn.Module) -> Tensor:
    """Return |W|; a quantized weight is dequantized."""
    return dense(module).double().abs()


def fisher(model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]] | None) -> Importance:
    """Return the squared gradients of the weights of `modules`, summed over the rows of `batches`.

    The model is not changed.

    Raises:
        ConfigError: there are no batches with labels, or a weight is stored in 8 or 4 bits and has no gradient.
    """
    if not batches or not all("labels" in batch for batch in batches):
        raise ConfigError(
            "init: fisher needs calibration batches with labels",
            "byway.attach(..., batches=[...]), or choose init: magnitude, which needs none",
        )
    if any(is_quantized(module) for module in modules):
        raise ConfigError("init: fisher needs gradients, and weights in 8 or 4 bits have none", "choose init: magnitude")
    weights: list[Any] = [module.weight for module in modules]
    sums = {id(weight): torch.zeros(weight.shape, dtype=torch.float64) for weight in weights}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 0}
        rows += [{k: v[i : i + 1] for k, v in tensors.items()} for i in range(len(tensors["labels"]))]
    device = weights[0].device
    unique = list({id(weight): weight for weight in weights}.values())
    try:
        with evaluating(model), torch.enable_grad():
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for weight in unique:
                weight.requires_grad_(True)
            for row in rows:
                loss = model(**{k: v.to(device) for k, v in row.items()}).loss
                found = torch.autograd.grad(loss, unique, allow_unused=True)
                for weight, gradient in zip(unique, found, strict=True):
                    if gradient is not None:
                        sums[id(weight)] += gradient.detach().double().square().cpu()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return lambda module: sums[id(module.weight)]
