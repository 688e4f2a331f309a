"""Next-token prediction: chats and texts. Loss −Σ log p(label_t | tokens before t); perplexity exp(mean loss)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from byway.data.collate import pack_batch, pad_batch, pad_token_id
from byway.data.encode import Encoded, Example, encode, shared
from byway.data.prepare import GENERATIVE
from byway.data.tokens import IGNORED
from byway.engine.loss.tokens import token_loss
from byway.tasks.task import Rows, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.formats import Documents

__all__ = ["CausalLM"]


class CausalLM(Task[Example]):
    """Learn to continue: the assistant's turns of a chat, a completion, or a whole text."""

    head = "causal_lm"
    language_model = True
    among = GENERATIVE

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Rows[Example]:
        self.pad_id = pad_token_id(tokenizer)
        train = self._encoded(self.documents, tokenizer, vocabulary_size)
        if self.held_out is None:
            return Rows(train.examples, (), {"train": train.report})
        held_out = self._encoded(self.held_out, tokenizer, vocabulary_size)
        common = shared(train, held_out)
        notes = (f"{common} of the evaluation examples are also in the training rows",) if common else ()
        return Rows(train.examples, held_out.examples, {"train": train.report, "eval": held_out.report}, notes)

    def _encoded(self, documents: Documents, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Encoded:
        data = self.data
        return encode(
            documents,
            tokenizer,
            max_length=data.max_length,
            learn=data.learn,
            overflow=data.overflow,
            template=data.template,
            vocabulary_size=vocabulary_size,
            skip_bad=data.skip_bad_rows,
        )

    def collate(self, examples: Sequence[Example], *, packed: bool = False) -> dict[str, Any]:
        return pack_batch(examples) if packed else pad_batch(examples, self.pad_id)

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def labels(self, example: Example) -> int:
        return len(example.labels) - 1 - example.labels[1:].count(IGNORED)

    def cut(self, example: Example, tokens: int) -> Example:
        """Its beginning, which other rows may have in common with it, and what stands around its first label."""
        ids, labels = example.input_ids, example.labels
        head = tokens // 2
        rest = tokens - head
        first = next((place for place, label in enumerate(labels) if place and label != IGNORED), 0)
        begin = min(max(head, first - rest // 4), max(len(ids) - rest, head))
        return Example(ids[:head] + ids[begin : begin + rest], labels[:head] + labels[begin : begin + rest], example.where)

    def read_by_head(self, examples: Sequence[Example]) -> dict[str, list[tuple[int, ...]]]:
        return {"labelled tokens": [tuple(i - 1 for i, y in enumerate(e.labels) if i and y != IGNORED) for e in examples]}

    def where(self, example: Example) -> str:
        return example.where

    def content(self, example: Example) -> object:
        return example.input_ids, example.labels

    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        return token_loss(model, batch, labels_only=labels_only, terms=self.terms)

    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        total, count = token_loss(model, batch, labels_only=labels_only)
        return {"loss": float(total), "labels": count}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        mean = sums["loss"] / max(sums["labels"], 1)
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
