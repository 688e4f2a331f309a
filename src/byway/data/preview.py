"""What the model will see of a row, as spans of text for people: learned or not, control token or text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from byway.data.encode import Encoded, Example
from byway.data.tokens import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreviewRow", "TextSpan", "as_plain_text", "preview", "preview_row", "printable"]


@dataclass(frozen=True)
class TextSpan:
    """Consecutive tokens of one kind, decoded. ``control``: one special token (never text that only looks like one)."""

    text: str
    learned: bool
    control: bool


@dataclass(frozen=True)
class PreviewRow:
    """One example: its address, its format, ``tokens`` in all and ``learned`` among them, and its text."""

    where: str
    format: str
    tokens: int
    learned: int
    spans: tuple[TextSpan, ...]


def preview(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, n: int = 3) -> list[PreviewRow]:
    """The first `n` examples as spans; the spans' texts joined are the tokenizer's own decoding of the row."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    return [preview_row(example, encoded.report.format, tokenizer, special) for example in encoded.examples[:n]]


def as_plain_text(row: PreviewRow) -> str:
    """Understandable without color: ⟦learned⟧, and «control token» so that it differs from text of the same letters."""
    parts = [f"{row.where} ({row.format}): {row.tokens} tokens, {row.learned} learned\n"]
    for learned, group in groupby(row.spans, key=lambda span: span.learned):
        inner = "".join(f"«{span.text}»" if span.control else printable(span.text) for span in group)
        parts.append(f"⟦{inner}⟧" if learned else inner)
    return "".join(parts)


def printable(text: str) -> str:
    """Line breaks and tabs as they are, every other control character as its escape: a row must not steer the terminal."""
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ch.encode("unicode_escape").decode() for ch in text)


def preview_row(example: Example, format: str, tokenizer: PreTrainedTokenizerBase, special: set[int]) -> PreviewRow:
    """One example as spans of text, each learned or not, with control tokens marked."""
    spans: list[TextSpan] = []
    ids = example.input_ids
    kinds = [(label != IGNORED, token if token in special else -1) for token, label in zip(ids, example.labels, strict=True)]
    done = ""
    end = 0
    for (learned, token), group in groupby(kinds):
        count = len(list(group))
        end += count
        whole = _decode(tokenizer, ids[:end])
        text = whole[len(done) :] if whole.startswith(done) else _decode(tokenizer, ids[end - count : end])
        done = whole
        spans.append(TextSpan(text, learned, token >= 0))
    learned_count = sum(label != IGNORED for label in example.labels)
    return PreviewRow(example.where, format, len(ids), learned_count, tuple(spans))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
