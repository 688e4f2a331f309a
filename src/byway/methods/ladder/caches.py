"""Side keys and values: further layers of the very cache that the backbone fills, so that generate, beams and reordering know nothing new.

Side block j attends with ``layer_idx`` L + j, where L is the number of the backbone's layers.
"""

from __future__ import annotations

from typing import Any

from byway.errors import AdapterError

__all__ = ["check", "extend"]


def _parts(cache: Any) -> tuple[Any, ...]:
    from transformers import EncoderDecoderCache

    return (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else (cache,)


def check(cache: Any, layers: int, blocks: int) -> None:
    """Refuse a cache that cannot grow, and one that holds tokens which the ladder has not seen.

    Args:
        cache: what the caller passed.
        layers: L, of the backbone.
        blocks: how many side blocks there are.
    """
    from transformers import DynamicCache

    parts = _parts(cache)
    for part in parts:
        if type(part) is not DynamicCache or part.offloading:
            kind = "an offloaded cache" if type(part) is DynamicCache else f"a {type(part).__name__}"
            raise AdapterError(
                f"{kind} has no room for the keys and values of a ladder's side blocks",
                "leave cache_implementation out",
            )
    own = parts[0]
    seen = own.get_seq_length() if own.layers else 0
    side = own.get_seq_length(layers) if len(own.layers) >= layers + blocks else 0
    if seen != side:
        raise AdapterError(
            f"the cache holds {seen} tokens of the backbone and {side} of the ladder: it was filled while the ladder was not active",
            "start from an empty cache",
        )


def extend(cache: Any, layers: int, kept: tuple[int, ...]) -> None:
    """Append a layer for each side block, of the kind that its backbone layer has."""
    for part in _parts(cache):
        while len(part.layers) < layers:  # grows as it is filled; a cross-attention cache may not have been yet
            part.layers.append(part.layer_class_to_replicate())
        for index in kept[len(part.layers) - layers :]:
            part.layers.append(_like(part.layers[index]))


def _like(layer: Any) -> Any:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    if type(layer) is DynamicLayer:
        return DynamicLayer()
    raise AdapterError(f"a cache of {type(layer).__name__} has no room for a ladder's side blocks", "use an ordinary DynamicCache")
