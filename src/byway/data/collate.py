"""``examples -> tensors``: packed (no padding, one row) or padded.

Nothing is normalized here: a loss is summed over the labels that are not -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from byway.data.encode import Example
from byway.data.labelled import LabelledExample
from byway.data.tokens import IGNORED
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pair", "pack_batch", "pack_labelled", "pack_pairs", "pad_batch", "pad_labelled", "pad_pairs", "pad_token_id"]


def pack_batch(examples: Sequence[Example]) -> dict[str, Any]:
    """Documents one after the other in one row of T tokens.

    ``input_ids``, ``labels``, ``position_ids`` (1, T): positions restart with each document, whose first token has the label -100, so that
    none is predicted from its neighbor. ``cu_seq_lens_q``, ``cu_seq_lens_k`` (documents + 1,) int32: where documents begin, and T.
    ``max_length_q``, ``max_length_k``: tokens of the longest. The attention must be block-diagonal by these; plain attention would leak.
    """
    _some(examples)
    lengths = [len(example.input_ids) for example in examples]
    ids = torch.tensor([[token for example in examples for token in example.input_ids]], dtype=torch.long)  # (1, T)
    labels = torch.tensor([[label for example in examples for label in example.labels]], dtype=torch.long)  # (1, T)
    bounds = _bounds(lengths)
    labels[0, bounds["cu_seq_lens_q"][:-1].long()] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        **bounds,
    }


def pad_batch(
    examples: Sequence[Example], pad_id: int, *, side: Literal["right", "left"] = "right", multiple_of: int = 1
) -> dict[str, Tensor]:
    """Rows of one width W, the longest rounded up to `multiple_of`.

    ``input_ids``, ``labels``, ``attention_mask`` (rows, W). Padding has the label -100 whatever `pad_id` is; so has each row's first token.
    """
    _some(examples)
    columns = {
        "input_ids": ([example.input_ids for example in examples], pad_id),
        "labels": ([[IGNORED, *example.labels[1:]] for example in examples], IGNORED),
        "attention_mask": ([[1] * len(example.input_ids) for example in examples], 0),
    }
    return {name: _padded(rows, fill, side, multiple_of) for name, (rows, fill) in columns.items()}


def pad_labelled(
    examples: Sequence[LabelledExample], pad_id: int, *, side: Literal["right", "left"] = "right", multiple_of: int = 1
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` (rows, W), ``token_type_ids`` where the tokenizer writes them, ``labels`` (rows,) class indices."""
    _some(examples)
    columns: dict[str, tuple[Sequence[Sequence[int]], int]] = {
        "input_ids": ([example.input_ids for example in examples], pad_id),
        "attention_mask": ([[1] * len(example.input_ids) for example in examples], 0),
    }
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if len(types) == len(examples):
        columns["token_type_ids"] = (types, 0)
    batch = {name: _padded(rows, fill, side, multiple_of) for name, (rows, fill) in columns.items()}
    batch["labels"] = torch.tensor([example.label for example in examples], dtype=torch.long)
    return batch


def pack_labelled(examples: Sequence[LabelledExample], pad_id: int) -> dict[str, Any]:
    """What :func:`pad_labelled` gives, padded on the right, and the bounds by which a trunk lays the rows side by side without padding.

    ``cu_seq_lens_q``, ``cu_seq_lens_k`` (rows + 1,) int32: where each row begins in the packed one, and its length T; in the order of
    `examples`. ``max_length_q``, ``max_length_k``: tokens of the longest.
    """
    _some(examples)
    bounds = _bounds([len(example.input_ids) for example in examples])
    return {**pad_labelled(examples, pad_id), **bounds}


@dataclass(frozen=True, slots=True)
class Pair:
    """What an encoder reads, and what the decoder is to say: `labels`, -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]
    where: str


def pack_pairs(examples: Sequence[Pair], pad_id: int, start_id: int | None) -> dict[str, Any]:
    """The sources side by side in one row of U tokens, the targets in another of T.

    ``input_ids`` (1, U); ``decoder_input_ids``, ``labels`` (1, T), each target shifted right by itself. ``cu_seq_lens_k`` says where
    sources begin (an attention's keys, in a decoder's cross-attention), ``cu_seq_lens_q`` where targets do; ``max_length_k``,
    ``max_length_q`` as in :func:`pack_batch`. `start_id`: the decoder's first token; None: the target's own last one (mBART).
    """
    _some(examples)
    shifted = [_shifted(example.labels, pad_id, start_id) for example in examples]
    rows = {
        "input_ids": [token for example in examples for token in example.input_ids],
        "decoder_input_ids": [token for ids in shifted for token in ids],
        "labels": [label for example in examples for label in example.labels],
    }
    bounds = _bounds([len(example.labels) for example in examples], [len(example.input_ids) for example in examples])
    return {**{name: torch.tensor([row], dtype=torch.long) for name, row in rows.items()}, **bounds}


def pad_pairs(examples: Sequence[Pair], pad_id: int, start_id: int | None, *, multiple_of: int = 1) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` (rows, W) and ``decoder_input_ids``, ``labels`` (rows, V), padded on the right; see pack_pairs."""
    _some(examples)
    columns: dict[str, tuple[Sequence[Sequence[int]], int]] = {
        "input_ids": ([example.input_ids for example in examples], pad_id),
        "attention_mask": ([[1] * len(example.input_ids) for example in examples], 0),
        "decoder_input_ids": ([_shifted(example.labels, pad_id, start_id) for example in examples], pad_id),
        "labels": ([example.labels for example in examples], IGNORED),
    }
    return {name: _padded(rows, fill, "right", multiple_of) for name, (rows, fill) in columns.items()}


def _shifted(labels: Sequence[int], pad_id: int, start_id: int | None) -> list[int]:
    """What a decoder reads when it is to say `labels`."""
    ids = [pad_id if label == IGNORED else label for label in labels]
    return [ids[-1] if start_id is None else start_id, *ids[:-1]]


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The tokenizer's padding token, else its end token, else its unknown token, else 0: padding is masked, so any id will do."""
    if tokenizer is None:
        return 0
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((cast("int", index) for index in ids if index is not None), 0)


def _bounds(queries: Sequence[int], keys: Sequence[int] | None = None) -> dict[str, Any]:
    """Lengths of documents → where they begin, and the total; `keys`: lengths on the side of the keys where they are others."""
    found: dict[str, Any] = {}
    for side, lengths in (("q", queries), ("k", queries if keys is None else keys)):
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.cumsum(torch.tensor(lengths), 0)
        found |= {f"cu_seq_lens_{side}": starts, f"max_length_{side}": max(lengths, default=0)}
    return found


def _some(examples: Sequence[object]) -> None:
    if not examples:
        raise ConfigError("a batch of no examples has no tensors")


def _padded(rows: Sequence[Sequence[int]], fill: int, side: str, multiple_of: int) -> Tensor:
    """(rows, W) of int64."""
    width = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    table = torch.full((len(rows), width), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        table[number, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return table
