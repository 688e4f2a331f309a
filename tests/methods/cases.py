"""Which methods go with which families in the contract, and with what fields where a default would not fit the tiny models."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from byway import methods
from byway.core.method import Method
from tests.tiny import DECODERS, FAMILIES

FIELDS: dict[str, dict[str, Any]] = {
    "bottleneck_adapter": {"reduction": 4},  # two units are too few: their gradients are below what float32 can add to a weight
}
"""Method → fields for the tiny models (hidden 32, three layers); what is not here runs with its defaults."""

REFUSED: dict[tuple[str, str], str] = {
    ("prompt_tuning", "vit"): "takes none",
    ("p_tuning", "vit"): "takes none",
}
"""(method, family) that do not go together → what the error says."""

SCALES: dict[str, float] = {"ladder_side_tuning": 0.5}
"""Method → how large its random numbers are, where 0.1 is too small: through several narrow blocks of 0.1 the gradients of queries and keys
fall below what float32 can add to a weight."""
ANOTHER_KERNEL = {
    ("full", "t5"): "once T5's position bias requires a gradient, torch attends with another kernel: 1e-6 apart",
    **{
        ("p_tuning", family): "a file holds what the LSTM gave when it was written; torch may run it by another kernel later"
        for family in FAMILIES
    },
}
"""(method, family) whose output before and after a flag changes is compared to 1e-5 and not bit for bit."""

UNMERGEABLE = {("bitfit", "llama"), ("bitfit", "t5")}
"""(method, family) that cannot be merged though the method can: these models have no biases, and get added ones."""


def has_an_effect(name: str) -> bool:
    """Whether the trained tensor of that name can change anything: a bias of keys adds the same to all scores of a query, so it cannot."""
    return re.search(r"(^|\.)(k|k_proj|key)\.byway\.\w+\.(copy\.)?bias$", name) is None


PAIRS = [(name, family) for name in methods.names() for family in FAMILIES if (name, family) not in REFUSED]
DECODER_PAIRS = [(name, family) for name, family in PAIRS if family in DECODERS]
WITH_LAYERS = [name for name in methods.names() if "layers" in {f.name for f in fields(methods.load(name))}]


def method_of(name: str, **changes: Any) -> Method:
    """The method of that name as the contract uses it."""
    return methods.load(name)(**(FIELDS.get(name, {}) | changes))
