"""Sources and targets for an encoder-decoder, padded and packed: what the packed attention of both sides is tested
with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from byway.engine.attention.unpack import packed_pairs
from byway.engine.loss.tokens import token_loss

__all__ = ["Pair", "pack_pairs", "pad_pairs", "target_loss"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The encoder's input and the decoder's labels (-100: not in the loss)."""

    input_ids: list[int]
    labels: list[int]
    where: str


def shifted(labels: Sequence[int], pad_id: int, start_id: int | None) -> list[int]:
    """The decoder's input for `labels`. `start_id`: its first token; None: the last label (mBART)."""
    ids = [pad_id if label == -100 else label for label in labels]
    return [ids[-1] if start_id is None else start_id, *ids[:-1]]


def pack_pairs(pairs: Sequence[Pair], pad_id: int, start_id: int | None) -> dict[str, Any]:
    """``input_ids`` (1, U); ``decoder_input_ids``, ``labels`` (1, T), each target shifted by itself; bounds of sources
    (k), targets (q)."""
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[token for pair in pairs for token in pair.input_ids]]),
        "decoder_input_ids": torch.tensor([[token for pair in pairs for token in shifted(pair.labels, pad_id, start_id)]]),
        "labels": torch.tensor([[label for pair in pairs for label in pair.labels]]),
    }
    for side, rows in (("q", [pair.labels for pair in pairs]), ("k", [pair.input_ids for pair in pairs])):
        lengths = torch.tensor([0, *map(len, rows)])
        batch |= {f"cu_seq_lens_{side}": lengths.cumsum(0).int(), f"max_length_{side}": int(lengths.max())}
    return batch


def pad_pairs(pairs: Sequence[Pair], pad_id: int, start_id: int | None) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` (rows, W); ``decoder_input_ids``, ``labels`` (rows, V); padded on the right."""

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded([pair.input_ids for pair in pairs], pad_id),
        "attention_mask": padded([[1] * len(pair.input_ids) for pair in pairs], 0),
        "decoder_input_ids": padded([shifted(pair.labels, pad_id, start_id) for pair in pairs], pad_id),
        "labels": padded([pair.labels for pair in pairs], -100),
    }


def target_loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
    """The summed loss of the labels of padded or, inside ``packing(model)``, packed pairs, and their number."""
    with packed_pairs(batch) if "cu_seq_lens_q" in batch else nullcontext():
        return token_loss(model, batch, labels_only=labels_only, next_token=False)
