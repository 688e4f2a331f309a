"""Strings that a tokenizer turns into control tokens: find them in a row, and find them again in what a template wrote.

Control tokens are the special tokens, and those added tokens that the chat template writes: many models do not flag
their turn markers as special. Inside a message each of them is text. (Other added tokens, such as words added to the
vocabulary, are ordinary tokens.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BRACKETS", "Control", "Span", "added_ids", "alternatives", "bracketed", "strings", "unbracketed"]

Span = tuple[int, int]
"""Characters ``[start, end)``."""

BRACKETS = ("\ufdd0", "\ufdd1")
"""Two Unicode noncharacters (reserved for use inside a program), put around strings to find them again."""


class Control:
    """The control tokens of a tokenizer. `written`: texts of its chat template, which add to the special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Iterable[str] = ()) -> None:
        self._tokenizer: Any = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        texts = list(written)
        self.special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        own = {token.content for token in added if token.content.strip() and any(token.content in text for text in texts)}
        self.pattern = alternatives(self.special | own)
        names = self.special | own
        self._beginnings = {name[:size] for name in names for size in range(1, len(name))}
        self._endings = {name[-size:] for name in names for size in range(1, len(name))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._first, self._last = {name[0] for name in self._beginnings}, {name[-1] for name in self._endings}
        # an added token that is compared after normalization is also found in other spellings, such as capitals
        normalizes = tokenizer.is_fast and self._tokenizer.backend_tokenizer.normalizer is not None
        loose = [token.content for token in added if token.normalized and token.content in names] if normalizes else []
        self._loose: set[int] = set(self._tokenizer.convert_tokens_to_ids(loose))
        self._normalized = alternatives(self._normal(name).strip("▁ ") for name in loose) if loose else None

    def _normal(self, text: str) -> str:
        return str(self._tokenizer.backend_tokenizer.normalizer.normalize_str(text))

    def spans(self, text: str) -> list[Span]:
        """Return where `text` holds strings of control tokens."""
        found = [match.span() for match in self.pattern.finditer(text)]
        if self._normalized is None or self._normalized.search(self._normal(text)) is None:
            return found
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token in self._loose and not any(start < other_end and other_start < end for other_start, other_end in found):
                inner = text[start:end]
                found.append((start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())))
        return sorted(found)

    def whole(self, text: str) -> bool:
        """Return whether all of `text` is the string of a control token, or a part of one."""
        return self.spans(text) == [(0, len(text))] or text in self._beginnings or text in self._endings

    def edges(self, text: str) -> list[Span]:
        """Return the ends of `text` that could be a part of a control token which goes on outside."""
        if not (self._first & set(text[-self._longest :]) or self._last & set(text[: self._longest])):
            return []  # quick: almost no text has a bracket there
        sizes = range(min(self._longest, len(text)), 0, -1)
        head = next((size for size in sizes if text[:size] in self._endings), 0)
        tail = next((size for size in sizes if text[-size:] in self._beginnings), 0)
        if head + tail > len(text):
            return [(0, len(text))]
        return ([(0, head)] if head else []) + ([(len(text) - tail, len(text))] if tail else [])


def alternatives(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of `names`, the longest first; blank ones are left out."""
    ordered = sorted({name for name in names if name.strip()}, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all added tokens, special or not."""
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from strings(key)
            yield from strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from strings(entry)


def bracketed(value: Any, control: Control, *, edges: bool = False, skip: Collection[str] = ()) -> Any:
    """Return the same structure with :data:`BRACKETS` around the strings of control tokens, except those in `skip`.

    With `edges` also around what could be a part of one at either end of a string.
    """
    if isinstance(value, str):
        spans = control.spans(value)
        if edges:
            free = (edge for edge in control.edges(value) if not any(edge[0] < end and start < edge[1] for start, end in spans))
            spans = sorted([*spans, *free])
        return _with_brackets(value, [(start, end) for start, end in spans if value[start:end] not in skip])
    if isinstance(value, Mapping):
        return {bracketed(key, control, skip=skip): bracketed(entry, control, edges=edges, skip=skip) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bracketed(entry, control, edges=edges, skip=skip) for entry in value]
    return value


def _with_brackets(text: str, spans: Iterable[Span]) -> str:
    parts, done = list[str](), 0
    for start, end in spans:
        parts += [text[done:start], BRACKETS[0], text[start:end], BRACKETS[1]]
        done = end
    return "".join([*parts, text[done:]])


def unbracketed(written: str) -> tuple[str, tuple[Span, ...]]:
    """Return `written` without brackets, and the spans that were between them."""
    opening, closing = BRACKETS
    text, spans = "", []
    for part in re.split(f"({opening}[^{opening}{closing}]*{closing})", written):
        inner = part.strip(opening + closing) if part.startswith(opening) else part
        if part.startswith(opening):
            spans.append((len(text), len(text) + len(inner)))
        text += inner
    return text, tuple(spans)
