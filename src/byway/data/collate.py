"""``examples -> tensors``, packed (one row without padding) or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from byway.data.encode import Example
from byway.data.labelled import LabelledExample
from byway.data.tokens import IGNORED
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["pack_batch", "pack_labelled", "pad_batch", "pad_labelled", "pad_token_id"]


def pack_batch(examples: Sequence[Example]) -> dict[str, Any]:
    """Put documents one after the other into one row of T tokens.

    ``input_ids``, ``labels``, ``position_ids`` (1, T): positions restart with each document, whose first token has the
    label -100, so that none is predicted from its neighbor. ``cu_seq_lens_q``, ``cu_seq_lens_k`` (documents + 1,)
    int32: where documents begin, and T. ``max_length_q``, ``max_length_k``: tokens of the longest. Attention must be
    block-diagonal by these; plain attention would leak.
    """
    _check(examples)
    ids = torch.tensor([[token for example in examples for token in example.input_ids]], dtype=torch.long)  # (1, T)
    labels = torch.tensor([[label for example in examples for label in example.labels]], dtype=torch.long)  # (1, T)
    bounds = _bounds(examples)
    labels[0, bounds["cu_seq_lens_q"][:-1].long()] = IGNORED
    positions = torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, **bounds}


def pad_batch(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the length W of the longest.

    ``input_ids``, ``labels``, ``attention_mask`` (rows, W). Padding has the label -100 whatever `pad_id` is; so has
    each row's first token.
    """
    _check(examples)
    return {
        "input_ids": _padded([example.input_ids for example in examples], pad_id),
        "labels": _padded([[IGNORED, *example.labels[1:]] for example in examples], IGNORED),
        "attention_mask": _padded([[1] * len(example.input_ids) for example in examples], 0),
    }


def pad_labelled(examples: Sequence[LabelledExample], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the length W of the longest.

    ``input_ids``, ``attention_mask`` (rows, W), ``token_type_ids`` (rows, W) if the tokenizer writes them, ``labels``
    (rows,) class indices.
    """
    _check(examples)
    batch = {
        "input_ids": _padded([example.input_ids for example in examples], pad_id),
        "attention_mask": _padded([[1] * len(example.input_ids) for example in examples], 0),
    }
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if len(types) == len(examples):
        batch["token_type_ids"] = _padded(types, 0)
    batch["labels"] = torch.tensor([example.label for example in examples], dtype=torch.long)
    return batch


def pack_labelled(examples: Sequence[LabelledExample], pad_id: int) -> dict[str, Any]:
    """Return :func:`pad_labelled`'s batch with the bounds by which the trunk packs its rows.

    ``cu_seq_lens_q``, ``cu_seq_lens_k`` (rows + 1,) int32: where each row begins in the packed one, and its length T.
    ``max_length_q``, ``max_length_k``: tokens of the longest.
    """
    return {**pad_labelled(examples, pad_id), **_bounds(examples)}


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the tokenizer's padding, end or unknown token, else 0: padding is masked, so any id will do."""
    if tokenizer is None:
        return 0
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((cast("int", index) for index in ids if index is not None), 0)


def _bounds(examples: Sequence[Example] | Sequence[LabelledExample]) -> dict[str, Any]:
    """Return where documents begin in a pack, with its length, and the longest; for queries and keys alike."""
    lengths = [len(example.input_ids) for example in examples]
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.cumsum(torch.tensor(lengths), 0)
    longest = max(lengths)
    return {"cu_seq_lens_q": starts, "max_length_q": longest, "cu_seq_lens_k": starts.clone(), "max_length_k": longest}


def _check(examples: Sequence[object]) -> None:
    if not examples:
        raise ConfigError("a batch needs at least one example")


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return `rows` padded on the right: (rows, W) int64."""
    table = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table
