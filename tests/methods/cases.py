"""Methods and model families of the contract, with the fields that the tiny models need instead of a default."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from byway import methods
from byway.core.method import Method
from tests.tiny import DECODERS, FAMILIES

FIELDS: dict[str, dict[str, Any]] = {
    "bottleneck_adapter": {"reduction": 4},  # with 2 units, gradients are too small to change a float32 weight
}
"""Method → fields for the tiny models (hidden 32, three layers). Methods not listed run with their defaults."""

REFUSED: dict[tuple[str, str], str] = {
    ("prompt_tuning", "vit"): "takes no embedded tokens",
    ("p_tuning", "vit"): "takes no embedded tokens",
}
"""(method, family) that cannot be combined → part of the error message."""

SCALES: dict[str, float] = {"ladder_side_tuning": 0.5}
"""Method → scale of its random tensors where 0.1 is too small: through several narrow blocks, the gradients of queries
and keys would be too small to change a float32 weight."""
ANOTHER_KERNEL = {
    ("full", "t5"): "once T5's position bias requires a gradient, torch uses another attention kernel: 1e-6 apart",
    **{
        ("p_tuning", family): "a file holds the output of the LSTM at saving time; torch may use another kernel later"
        for family in FAMILIES
    },
}
"""(method, family) → why outputs are compared to 1e-5 instead of bit for bit."""

UNMERGEABLE = {("bitfit", "llama"), ("bitfit", "t5")}
"""(method, family) that cannot be merged although the method can: these models have no biases, so new ones are added."""


def has_an_effect(name: str) -> bool:
    """True unless the tensor is a bias of keys: it adds the same to all scores of a query: no effect."""
    return re.search(r"(^|\.)(k|k_proj|key)\.byway\.\w+\.(copy\.)?bias$", name) is None


PAIRS = [(name, family) for name in methods.names() for family in FAMILIES if (name, family) not in REFUSED]
DECODER_PAIRS = [(name, family) for name, family in PAIRS if family in DECODERS]
WITH_LAYERS = [name for name in methods.names() if "layers" in {f.name for f in fields(methods.load(name))}]


def method_of(name: str, **changes: Any) -> Method:
    """Return the method of that name as the contract uses it."""
    return methods.load(name)(**(FIELDS.get(name, {}) | changes))
