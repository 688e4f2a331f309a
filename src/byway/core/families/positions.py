"""The position ids of tokens, and how they move if virtual tokens or a prefix come before them.

Without ``position_ids`` a model derives them itself: from the columns (Llama, BERT), from the padding mask (OPT) or
from the token ids (RoBERTa, starting at ``padding_idx + 1``). Code that puts tokens in front of the text must pass
them, and derives them from the mask, so that padding on either side gives the same result.

Shapes: b batch, t tokens of this call, u tokens of this call and before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families.facts import Facts, inside
from byway.core.slots import base_modules, parent_path
from byway.core.weights import is_conv
from byway.errors import AdapterError

__all__ = ["Positions", "length_of", "past_length", "position_tables"]

_TABLES = frozenset({"embed_positions", "pos_embed", "position_embedding", "position_embeddings", "wpe"})
"""Names of embeddings of positions."""


@dataclass(frozen=True)
class Positions:
    """How a trunk numbers its tokens."""

    accepted: bool
    """True if its forward takes ``position_ids``. Models with ALiBi or relative positions do not need them."""
    padding_id: int | None = None
    """RoBERTa: positions count the tokens other than this one, starting after its value. None: they start at 0."""
    limit: int | None = None
    """Tokens for which its embedding of positions has a row; None if positions are computed."""

    @classmethod
    def of(cls, trunk: nn.Module) -> Positions:
        """Read them from the trunk's forward and its embedding of positions."""
        accepted = "position_ids" in inspect.signature(type(trunk).forward).parameters
        for path, module in base_modules(trunk):
            if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES:
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                return cls(accepted, module.padding_idx, module.num_embeddings - first)
        return cls(accepted)

    def explicit(self, inputs: Mapping[str, Any], past: int) -> Tensor:
        """Return the position ids (b or 1, t) of the base: given, else from token ids or mask, else counted.

        Args:
            inputs: the trunk's arguments by name, without virtual tokens.
            past: tokens in the cache.
        """
        given = inputs.get("position_ids")
        if given is not None:
            if given.ndim != 2:
                raise AdapterError(f"position_ids have {given.ndim} dimensions; with virtual tokens they must be (batch, tokens)")
            return given
        ids, mask, t = inputs.get("input_ids"), inputs.get("attention_mask"), length_of(inputs)
        first = 0 if self.padding_id is None else self.padding_id + 1
        if self.padding_id is not None and ids is not None and not past:
            real = (ids.reshape(-1, t) != self.padding_id).long()
            return real.cumsum(1) * real + self.padding_id
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -t:] + first  # (b, u) -> (b, t)
        source = ids if ids is not None else inputs["inputs_embeds"]
        return torch.arange(past + first, past + first + t, device=source.device)[None]


def position_tables(model: nn.Module, found: Facts, stack: str) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield the embeddings of positions that belong to one stack, by path.

    They are inside the largest part of the model that contains the stack and no other. Embeddings of image patches are
    left out.
    """
    others = [path for name, path in found.stack_modules.items() if name != stack]
    home = found.stack_modules[stack]
    while home and not any(inside(other, parent_path(home)) for other in others):
        home = parent_path(home)
    for path, module in base_modules(model):
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES and inside(path, home):
            owner = model.get_submodule(parent_path(path))
            if not any(is_conv(part) for part in owner.children()):
                yield path, module


def length_of(inputs: Mapping[str, Any]) -> int:
    """Return t, the tokens of this call, from ids or embeddings."""
    ids = inputs.get("input_ids")
    return ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]


def past_length(inputs: Mapping[str, Any]) -> int:
    """Return the tokens in the cache that the trunk is called with; 0 without one."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()
