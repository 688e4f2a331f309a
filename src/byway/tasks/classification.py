"""``data.task: classification``: a class for a text or a pair of texts. Loss −Σ log softmax(logits)[class]; accuracy.

The head over the encoder is trained as a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.attention import packed
from byway.data.collate import pack_labelled, pad_labelled, pad_token_id
from byway.data.documents import Labelled
from byway.data.encode import Encoded
from byway.data.labelled import LabelledExample, class_names, encode_labelled, suspicious
from byway.data.preview import PreviewRow, TextSpan
from byway.engine.attention.unpack import longest, packed_rows
from byway.engine.last_layer import positions_read
from byway.engine.loss.cross_entropy import NLL, LossTerms, summed_loss
from byway.errors import ConfigError, DataError
from byway.tasks.task import READ, Rows, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.formats import Documents
    from byway.recipe.sections import Data

__all__ = ["Classification", "row_logits"]


class Classification(Task[LabelledExample]):
    """Train to name the class of a text."""

    head = "classification"
    formats = ("classification",)
    keys = frozenset({"labels"})
    criterion = "accuracy"
    higher_is_better = True

    def __init__(self, data: Data, *, seed: int, terms: LossTerms = NLL) -> None:
        super().__init__(data, seed=seed, terms=terms)
        rows = [row for row in self.documents.items if isinstance(row, Labelled) and not row.unusable()]
        self.names = data.labels or class_names(rows)
        if len(self.names) < 2:
            raise DataError(
                f"{self.documents.source}: all rows have the same class, so there is nothing to classify",
                "name all classes with data.labels",
            )

    @classmethod
    def check(cls, data: Data) -> list[tuple[str, str]]:
        padded = [name for name in data.labels or () if name != name.strip() or not name]
        wrong = [("labels", f"data.labels has {name!r}: white space around a name does not count") for name in padded[:1]]
        return super().check(data) + wrong

    @classmethod
    def complete(cls, data: Data) -> bool:
        return data.labels is not None

    def resolved(self) -> Data:
        """Return the ``data`` section with the names of the classes, in the order of their indices."""
        return replace(self.data, labels=tuple(self.names))

    def base_options(self) -> dict[str, Any]:
        return {"task": self.head, "label_names": self.names}

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Rows[LabelledExample]:
        rows = super().encode(tokenizer, vocabulary_size)
        notes = [] if self.data.labels else suspicious(self.names)
        seen = len({example.label for example in rows.train})
        if 2 * seen < len(self.names):
            notes.append(f"{seen:,} of {len(self.names):,} classes have training rows")
        return replace(rows, notes=(*rows.notes, *notes))

    def encode_documents(
        self, documents: Documents, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int
    ) -> Encoded[LabelledExample]:
        if tokenizer is None:
            raise ConfigError("the base has no tokenizer, so text cannot be encoded", "use a base with a tokenizer")
        self.pad_id = pad_token_id(tokenizer)
        return encode_labelled(documents, tokenizer, self.data.max_length, self.names, vocabulary_size)

    def collate(self, examples: Sequence[LabelledExample], *, packed: bool = False) -> dict[str, Any]:
        return (pack_labelled if packed else pad_labelled)(examples, self.pad_id)

    def length(self, example: LabelledExample) -> int:
        return len(example.input_ids)

    def labels(self, example: LabelledExample) -> int:
        return 1

    def cut(self, example: LabelledExample, tokens: int) -> LabelledExample:
        """Return its beginning and its end, which hold the special tokens that a head may read."""
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

    def describe(self, examples: Sequence[LabelledExample]) -> list[str]:
        counts = [sum(example.label == number for example in examples) for number in range(len(self.names))]
        return [f"classes: {', '.join(f'{name} {count:,}' for name, count in zip(self.names, counts, strict=True))}"]

    def preview(self, example: LabelledExample, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
        name = self.names[example.label]
        text = TextSpan(str(tokenizer.decode(example.input_ids)), in_loss=False, control=False)
        return PreviewRow(
            example.where, f"{len(example.input_ids):,} tokens, label {name}", (text, TextSpan(f" → {name}", in_loss=True, control=False))
        )

    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        logits = row_logits(model, batch)
        return summed_loss(logits, batch["labels"], self.terms), len(logits)

    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        logits, labels = row_logits(model, batch), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": float(loss), "labels": len(labels), "correct": int((logits.argmax(-1) == labels).sum())}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(sums["labels"], 1)
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}


def row_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of a batch of rows, padded or packed: (rows, classes), float32."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", READ)}
    with positions_read(batch.get(READ)):
        if "cu_seq_lens_q" not in inputs:
            return model(**inputs).logits.float()
        with packed(longest(inputs)), packed_rows(inputs) as rows:
            return model(**rows).logits.float()
