"""The attentions of a model: cross-attentions, and the number and size of key and value heads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from byway.core.families.facts import Facts
from byway.core.slots import base_modules
from byway.core.weights import features, is_linear
from byway.errors import TargetError

__all__ = ["KeyValueHeads", "is_cross_attention", "key_value_heads"]

_CROSS = re.compile(r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)(\.|$)", re.IGNORECASE)
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
"""Names under which attention modules store the size of a head."""


@dataclass(frozen=True)
class KeyValueHeads:
    """The key and value heads of one attention."""

    path: str
    heads: int
    """g: key and value heads; with grouped-query attention fewer than query heads."""
    key_size: int
    value_size: int
    inputs: int
    """Width of the hidden states from which keys are computed."""

    @property
    def width(self) -> int:
        """w: elements of the keys and values of one token."""
        return self.heads * (self.key_size + self.value_size)


def is_cross_attention(path: str) -> bool:
    """True if `path` is, or lies inside, the cross-attention of a decoder."""
    return _CROSS.search(path) is not None


def key_value_heads(model: nn.Module, found: Facts, path: str) -> KeyValueHeads:
    """Return the heads of the attention at `path`, from its head size and the widths of its key and value maps.

    Raises:
        TargetError: they are not known.
    """
    module = model.get_submodule(path)
    known = vars(module)
    inputs = [features(linear)[0] for own, linear in base_modules(module) if own and is_linear(linear)]
    # latent attention (DeepSeek): keys and values differ in size
    if {"num_heads", "qk_head_dim", "v_head_dim"} <= known.keys():
        return KeyValueHeads(path, known["num_heads"], known["qk_head_dim"], known["v_head_dim"], inputs[0])
    size = next((known[name] for name in _HEAD_SIZES if isinstance(known.get(name), int)), None)
    widths: dict[str, int] = {}
    for part in ("k", "v"):
        for own, ranges in found.projections(part).items():
            if own.startswith(f"{path}."):
                runs = ranges or ((0, features(model.get_submodule(own))[1]),)
                widths[part] = sum(stop - start for start, stop in runs)
    if not size or len(widths) < 2 or widths["k"] % size or widths["v"] % (widths["k"] // size):
        kind = type(module).__name__
        raise TargetError(f"the number and size of the key heads of {path!r} ({kind}) cannot be told from its structure")
    heads = widths["k"] // size
    return KeyValueHeads(path, heads, size, widths["v"] // heads, inputs[0])
