"""What the tests of LoRA share: how far apart two tensors are."""

from __future__ import annotations

from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
