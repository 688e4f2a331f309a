"""Classification of a text or a pair of texts: a head over the encoder, trained as a copy. Loss −Σ log softmax(logits)[class]; accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.attention import packed
from byway.data.collate import pack_labelled, pad_labelled, pad_token_id
from byway.data.documents import Labelled
from byway.data.labelled import LabelledExample, class_names, encode_labelled
from byway.engine.attention.unpack import longest, packed_rows
from byway.engine.last_layer import reading
from byway.engine.loss.cross_entropy import NLL, LossTerms, summed_loss
from byway.errors import ConfigError, DataError
from byway.tasks.task import READ, Rows, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.recipe.sections import Data

__all__ = ["Classification"]


class Classification(Task[LabelledExample]):
    """Learn to name the class of a text."""

    head = "classification"
    criterion = "accuracy"
    higher_is_better = True
    among = ("classification",)

    def __init__(self, data: Data, *, seed: int, terms: LossTerms = NLL) -> None:
        super().__init__(data, seed=seed, terms=terms)
        rows = [row for row in self.documents.items if isinstance(row, Labelled) and not row.unusable()]
        self.names = data.labels or class_names(rows)
        if len(self.names) < 2:
            raise DataError(
                f"{self.documents.source}: there is only one class, so nothing can be told apart",
                "name the classes with data.labels",
            )

    def resolved(self) -> Data:
        """The names of the classes, in the order of their indices."""
        return replace(self.data, labels=tuple(self.names))

    def base_options(self) -> dict[str, Any]:
        return {"task": self.head, "label_names": self.names}

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Rows[LabelledExample]:
        if tokenizer is None:
            raise ConfigError("the base has no tokenizer, so text cannot be encoded", "use a base with a tokenizer")
        self.pad_id = pad_token_id(tokenizer)
        train = encode_labelled(self.documents, tokenizer, self.data.max_length, self.names, skip_bad=self.data.skip_bad_rows)
        if self.held_out is None:
            return Rows(train.examples, (), {"train": train.report})
        held_out = encode_labelled(self.held_out, tokenizer, self.data.max_length, self.names, skip_bad=self.data.skip_bad_rows)
        common = len(train.keys & held_out.keys)
        notes = (f"{common} of the evaluation examples are also in the training rows",) if common else ()
        return Rows(train.examples, held_out.examples, {"train": train.report, "eval": held_out.report}, notes)

    def collate(self, examples: Sequence[LabelledExample], *, packed: bool = False) -> dict[str, Any]:
        return (pack_labelled if packed else pad_labelled)(examples, self.pad_id)

    def length(self, example: LabelledExample) -> int:
        return len(example.input_ids)

    def labels(self, example: LabelledExample) -> int:
        return 1

    def cut(self, example: LabelledExample, tokens: int) -> LabelledExample:
        """Its beginning and its end, where the special tokens are that a head may read."""
        length = len(example.input_ids)
        if length <= tokens:
            return example
        kept = [*range(tokens - tokens // 2), *range(length - tokens // 2, length)]
        types = example.token_type_ids
        return replace(
            example,
            input_ids=[example.input_ids[place] for place in kept],
            token_type_ids=None if types is None else [types[place] for place in kept],
        )

    def read_by_head(self, examples: Sequence[LabelledExample]) -> dict[str, list[tuple[int, ...]]]:
        last = [max((i for i, token in enumerate(e.input_ids) if token != self.pad_id), default=0) for e in examples]
        return {"first token": [(0,)] * len(examples), "last token": [(i,) for i in last]}

    def where(self, example: LabelledExample) -> str:
        return example.where

    def content(self, example: LabelledExample) -> object:
        return example.input_ids, example.label

    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        logits, labels = _logits(model, batch)
        return summed_loss(logits, labels, self.terms), len(labels)

    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        logits, labels = _logits(model, batch)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": float(loss), "labels": len(labels), "correct": int((logits.argmax(-1) == labels).sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(sums["labels"], 1)
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (b, classes) in float32, labels (b,)."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", READ)}
    with reading(batch.get(READ)):
        if "cu_seq_lens_q" not in inputs:
            return model(**inputs).logits.float(), batch["labels"]
        with packed(longest(inputs)), packed_rows(inputs) as rows:
            return model(**rows).logits.float(), batch["labels"]
