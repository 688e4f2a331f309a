"""What a method's field may hold: the checks that several methods make, with the words of their errors."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["bias_problems", "dropout_problems", "finite", "whole"]


def whole(value: Any) -> bool:
    """Whether `value` is a whole number (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    """Whether `value` is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dropout_problems(value: Any) -> list[str]:
    """What is wrong with a dropout rate; nothing where it is in [0, 1)."""
    return [] if finite(value) and 0 <= value < 1 else [f"dropout is {value!r}; it must be at least 0 and below 1"]


def bias_problems(value: Any) -> list[str]:
    """What is wrong with a choice of biases that are trained too."""
    return [] if value in ("none", "all", "lora_only") else [f"bias is {value!r}; it must be none, all or lora_only"]
