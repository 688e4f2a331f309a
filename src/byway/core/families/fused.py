"""Fused linear maps: which output features are queries, keys and values.

Every known layout is `groups` repetitions of the same consecutive blocks. With H attention heads, G key/value heads and
head size e: GPT-2 and MPT one group of (He, He, He); Phi-3 one of (He, Ge, Ge); GPT-NeoX and BLOOM H groups of (e, e,
e); Falcon-40B G groups of (H/G·e, e, e); CodeGen four groups of (He/4, He/4, He/4) in the order q, v, k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LAYOUTS", "Fused"]


@dataclass(frozen=True)
class Fused:
    """The output features of a fused map: `groups` repetitions of blocks of `sizes`, named by `parts`."""

    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def ranges(self, part: str) -> tuple[tuple[int, int], ...]:
        """Return (start, stop) of every run of output features that belongs to `part`."""
        index = self.parts.index(part)
        offset, period = sum(self.sizes[:index]), sum(self.sizes)
        return tuple((g * period + offset, g * period + offset + self.sizes[index]) for g in range(self.groups))


def _qkv(config: Any, out: int, keys: int, groups: int = 1) -> Fused:
    """Return the layout of `keys` key heads and as many value heads, in `groups`."""
    heads = config.num_attention_heads
    size = out // (heads + 2 * keys)
    return Fused(("q", "k", "v"), (heads // groups * size, keys // groups * size, keys // groups * size), groups)


def _one_group(config: Any, out: int) -> Fused:
    return _qkv(config, out, config.to_dict().get("num_key_value_heads") or config.num_attention_heads)


def _per_head(config: Any, out: int) -> Fused:
    return _qkv(config, out, config.num_attention_heads, config.num_attention_heads)


def _one_key_head(config: Any, out: int) -> Fused:
    return _qkv(config, out, 1) if config.multi_query else _per_head(config, out)


def _falcon(config: Any, out: int) -> Fused:
    new = config.new_decoder_architecture
    return _qkv(config, out, config.num_kv_heads, config.num_kv_heads) if new else _one_key_head(config, out)


LAYOUTS: Mapping[str, Callable[[Any, int], Fused]] = {
    "qkv": _one_group,
    "qkv per head": _per_head,
    "qkv of one key head": _one_key_head,
    "qkv of falcon": _falcon,
    "qvk in four": lambda config, out: Fused(("q", "v", "k"), (out // 12,) * 3, 4),
    "gate up": lambda config, out: Fused(("gate", "up"), (out // 2, out // 2)),
}
"""Name of the layout in the table -> function of (configuration, number of output features) that returns the layout."""
