"""Next-token prediction, for ``chat`` and ``text``. Loss −Σ log p(label_t | tokens before t); perplexity exp(mean)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from byway.data.collate import pack_batch, pad_batch, pad_token_id
from byway.data.encode import Encoded, Example, encode
from byway.data.preview import PreviewRow, preview
from byway.data.template import set_template, template_text
from byway.data.tokens import IGNORED
from byway.engine.loss.tokens import token_loss
from byway.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.formats import Documents
    from byway.recipe.sections import Data

__all__ = ["CausalLM"]


class CausalLM(Task[Example]):
    """Train to continue: the assistant's turns of a conversation, a completion, or a whole text."""

    head = "causal_lm"
    language_model = True
    formats = ("tokens", "messages", "sharegpt", "prompt_completion", "alpaca", "text")

    def set_up(self, tokenizer: PreTrainedTokenizerBase) -> None:
        set_template(tokenizer, self.data.template, self.data.template_variables)

    def resolved(self) -> Data:
        """Put the text of a template's file in place of its name: the file may change after the run."""
        given = self.data.template
        return self.data if given is None else replace(self.data, template=template_text(given))

    def encode_documents(self, documents: Documents, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int) -> Encoded[Example]:
        data = self.data
        self.pad_id = pad_token_id(tokenizer)
        return encode(
            documents,
            tokenizer,
            max_length=data.max_length,
            learn=data.learn,
            overflow=data.overflow,
            template=data.template,
            variables=data.template_variables,
            vocabulary_size=vocabulary_size,
        )

    def collate(self, examples: Sequence[Example], *, packed: bool = False) -> dict[str, Any]:
        return pack_batch(examples) if packed else pad_batch(examples, self.pad_id)

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def labels(self, example: Example) -> int:
        return len(example.labels) - 1 - example.labels[1:].count(IGNORED)

    def cut(self, example: Example, tokens: int) -> Example:
        """Return its beginning, which other rows may share, and the tokens around its first label."""
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

    def preview(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
        return preview(example, tokenizer)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
        return token_loss(model, batch, labels_only=labels_only, terms=self.terms)

    def measure(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> dict[str, float]:
        total, count = token_loss(model, batch, labels_only=labels_only)
        return {"loss": float(total), "labels": count}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        mean = sums["loss"] / max(sums["labels"], 1)
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
