"""The loss of an encoder-decoder, on padded pairs of source and target or on packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from byway.engine.attention.unpack import packed_pairs
from byway.engine.loss.tokens import token_loss

__all__ = ["target_loss"]


def target_loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
    """Σ −log softmax(head(h_t))[label_t] over the labelled tokens of the targets (nats), and how many there are.

    Args:
        model: an encoder-decoder with a language-model head.
        batch: of :func:`byway.data.collate.pad_pairs` or, inside :func:`byway.engine.attention.packing.packing`, of ``pack_pairs``.
        labels_only: compute logits for labelled tokens only; else for all, which is the plain twin.
    """
    with packed_pairs(batch) if "cu_seq_lens_q" in batch else nullcontext():
        return token_loss(model, batch, labels_only=labels_only, next_token=False)
