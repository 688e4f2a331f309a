"""Which positions real tokens have, and where they stand when virtual ones come before them.

The base derives positions itself where none are given: from the columns (Llama, BERT), from the padding mask (OPT) or from the token ids
(RoBERTa, from ``padding_idx + 1`` on). Whoever puts virtual tokens in front must say them, and says them from the mask, so that padding on
either side gives the same. Legend: b batch, t tokens of this call, u tokens seen so far and now.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import base_modules
from byway.errors import AdapterError

__all__ = ["Positions", "length_of", "past_length"]

_LEARNED = ("position_embeddings", "wpe", "embed_positions", "pos_embed")
"""What tables of learned positions are called."""


@dataclass(frozen=True)
class Positions:
    """How one trunk numbers its tokens."""

    accepted: bool
    """Whether its forward takes ``position_ids`` (ALiBi and relative distances do not need them)."""
    padding_id: int | None = None
    """RoBERTa: positions count tokens other than this one and begin right after it; None: they begin at 0."""
    limit: int | None = None
    """Tokens that its table of learned positions holds; None where positions are computed."""

    @classmethod
    def of(cls, trunk: nn.Module) -> Positions:
        """Read from the trunk's forward and from its table of positions."""
        accepted = "position_ids" in inspect.signature(type(trunk).forward).parameters
        for path, module in base_modules(trunk):
            if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _LEARNED:
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                return cls(accepted, module.padding_idx, module.num_embeddings - first)
        return cls(accepted)

    def explicit(self, inputs: Mapping[str, Any], past: int) -> Tensor:
        """The positions (b or 1, t) of this call's tokens as the base has them: those given, else derived from ids or mask, else counted.

        Args:
            inputs: the trunk's arguments by name, without virtual tokens.
            past: tokens in the cache.
        """
        given = inputs.get("position_ids")
        if given is not None:
            if given.ndim != 2:
                raise AdapterError(f"position_ids have {given.ndim} dimensions; virtual tokens need one position a token (b, t)")
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

    def shifted(self, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
        """`inputs` with every token `count` positions further on, for what stands before them without being in the sequence (a prefix).

        Masks and caches hold text alone and stay as they are. Nothing changes where the trunk takes no positions.
        """
        if not self.accepted or not count:
            return dict(inputs)
        return {**inputs, "position_ids": self.explicit(inputs, past_length(inputs)) + count}


def length_of(inputs: Mapping[str, Any]) -> int:
    """t: tokens of this call, from ids or embeddings."""
    ids = inputs.get("input_ids")
    return ids.shape[-1] if ids is not None else inputs["inputs_embeds"].shape[1]


def past_length(inputs: Mapping[str, Any]) -> int:
    """Tokens in the cache that the trunk is called with; 0 without one."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()
