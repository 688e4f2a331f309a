"""An example as spans of text for display: in the loss or not, control token or text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from byway.data.control import added_ids
from byway.data.encode import Example
from byway.data.tokens import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreviewRow", "TextSpan", "preview", "printable"]


@dataclass(frozen=True)
class TextSpan:
    """Consecutive tokens of one kind, decoded. ``control``: one added token, not text that looks like one."""

    text: str
    in_loss: bool
    control: bool


@dataclass(frozen=True)
class PreviewRow:
    """One example: its address, its size and labels in words, and its text."""

    where: str
    title: str
    spans: tuple[TextSpan, ...]


def preview(example: Example, tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """Return an example for display; the texts of its spans, joined, are the tokenizer's own decoding."""
    added = added_ids(tokenizer)
    spans: list[TextSpan] = []
    ids = example.input_ids
    kinds = [(label != IGNORED, token if token in added else -1) for token, label in zip(ids, example.labels, strict=True)]
    done = ""
    end = 0
    for (in_loss, token), group in groupby(kinds):
        count = len(list(group))
        end += count
        whole = _decode(tokenizer, ids[:end])
        text = whole[len(done) :] if whole.startswith(done) else _decode(tokenizer, ids[end - count : end])
        done = whole
        spans.append(TextSpan(text, in_loss, token >= 0))
    in_loss_count = sum(label != IGNORED for label in example.labels)
    return PreviewRow(example.where, f"{len(ids):,} tokens, {in_loss_count:,} in the loss", tuple(spans))


def printable(text: str) -> str:
    """Escape control characters except line breaks and tabs: a row must not control the terminal."""
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ch.encode("unicode_escape").decode() for ch in text)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
