"""The side blocks' keys and values: extra layers of the backbone's own cache, so generation and beam search just work.

Side block j has ``layer_idx`` L + j, where L is the number of layers of the backbone.
"""

from __future__ import annotations

from typing import Any

from byway.errors import AdapterError

__all__ = ["check", "extend"]


def _parts(cache: Any) -> tuple[Any, ...]:
    from transformers import EncoderDecoderCache

    return (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else (cache,)


def check(cache: Any, layers: int, blocks: int) -> None:
    """Refuse a cache that cannot grow, and one with tokens that the ladder has not seen.

    Args:
        cache: the cache that the caller passed.
        layers: L, the layers of the backbone.
        blocks: the number of side blocks.

    Raises:
        AdapterError: the cache cannot be used with this ladder.
    """
    from transformers import DynamicCache

    parts = _parts(cache)
    for part in parts:
        if type(part) is not DynamicCache or part.offloading:
            kind = "an offloaded cache" if type(part) is DynamicCache else f"a {type(part).__name__}"
            raise AdapterError(f"{kind} has no room for the keys and values of a ladder's side blocks", "leave cache_implementation out")
    own = parts[0]
    seen = own.get_seq_length() if own.layers else 0
    side = own.get_seq_length(layers) if len(own.layers) >= layers + blocks else 0
    if seen != side:
        raise AdapterError(
            f"the cache holds {seen} tokens of the backbone and {side} of the ladder: it was filled while the ladder was inactive",
            "start from an empty cache",
        )


def extend(cache: Any, layers: int, kept: tuple[int, ...]) -> None:
    """Append a layer for each side block, of the same kind as its backbone layer's."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for part in _parts(cache):
        while len(part.layers) < layers:  # a cache grows as it is filled; that of a cross-attention may still be empty
            part.layers.append(part.layer_class_to_replicate())
        for index in kept[len(part.layers) - layers :]:
            layer = part.layers[index]
            if type(layer) is DynamicSlidingWindowLayer:
                part.layers.append(DynamicSlidingWindowLayer(sliding_window=layer.sliding_window))
            elif type(layer) is DynamicLayer:
                part.layers.append(DynamicLayer())
            else:
                raise AdapterError(f"a cache of {type(layer).__name__} has no room for a ladder's side blocks", "use a DynamicCache")
