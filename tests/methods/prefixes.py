"""What the tests of prefixes share: a plain method, and the same keys and values as a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from byway import PrefixTuning
from byway.core.adapter import Adapter
from byway.methods.prefix.sides import Prefix

FP64, FP32 = 1e-12, 1e-5  # largest difference of logits (reliability I23)


def direct(**changes: Any) -> PrefixTuning:
    return PrefixTuning(**({"hidden_size": None, "num_virtual_tokens": 3, "modules_to_save": "none"} | changes))


def table_of(adapter: Adapter, group: str) -> Any:
    return next(side for _, side in adapter.side_paths() if isinstance(side, Prefix)).table(group)


def pairs(weight: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """(P, 2L·g·e) → a key and a value (g, P, e) for each layer, by the layout that peft documents."""
    states = weight.reshape(weight.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return [(states[2 * i], states[2 * i + 1]) for i in range(layers)]


def cache_of(states: list[tuple[Tensor, Tensor]], rows: int) -> DynamicCache:
    cache = DynamicCache()
    for i, (key, value) in enumerate(states):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), i)
    return cache
