"""A template such as ``"<T1> <T2> {text} Answer: <T3>"``: virtual tokens and fixed words around the text of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from byway.errors import ConfigError

__all__ = ["Template"]

TEXT = "{text}"
_TAG = re.compile(r"<T(\d*)(?:\*(\d+))?>")
_LARGEST = 100_000
"""More virtual tokens than any context holds; a larger number is a slip."""


@dataclass(frozen=True)
class Template:
    """What stands before and after the text. A piece is the index of a virtual token, or words as they are written."""

    before: tuple[int | str, ...]
    after: tuple[int | str, ...] = ()

    @classmethod
    def plain(cls, count: int) -> Template:
        """`count` virtual tokens, then the text."""
        return cls(tuple(range(count)))

    @classmethod
    def parse(cls, text: str) -> Template:
        """``<T>`` is one virtual token, ``<T*5>`` five, ``<T3>`` the third (written twice, it stands twice); ``{text}`` is the row.

        Words between them are frozen. They are tokenized piece by piece, each as it is written, without white space at its end.

        Raises:
            ConfigError: no or two ``{text}``, no virtual token, numbers with gaps, or numbered and unnumbered tokens in one template.
        """
        parts = text.split(TEXT)
        if len(parts) != 2:
            raise ConfigError(f"the template {text!r} has {len(parts) - 1} times {{text}}; it must stand there once")
        tags = [match for part in parts for match in _TAG.finditer(part)]
        _check(text, tags)
        fresh = 0
        sides: list[tuple[int | str, ...]] = []
        for part in parts:
            pieces: list[int | str] = []
            end = 0
            for tag in _TAG.finditer(part):
                pieces += _words(part[end : tag.start()])
                end = tag.end()
                if tag[1]:
                    pieces.append(int(tag[1]) - 1)
                else:
                    count = int(tag[2] or 1)
                    pieces += range(fresh, fresh + count)
                    fresh += count
            sides.append((*pieces, *_words(part[end:])))
        return cls(*sides)

    @property
    def pieces(self) -> tuple[int | str, ...]:
        """All of them, in order."""
        return (*self.before, *self.after)

    @property
    def count(self) -> int:
        """How many different virtual tokens there are."""
        return len({piece for piece in self.pieces if isinstance(piece, int)})

    @property
    def words(self) -> tuple[str, ...]:
        """The fixed words, piece by piece."""
        return tuple(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but virtual tokens before the text, each once."""
        return self == Template.plain(self.count)

    def tokens(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of each piece of words; pieces are tokenized alone, so that nothing merges across a virtual token."""
        found = [list(tokenizer(words, add_special_tokens=False).input_ids) for words in self.words]
        empty = [words for words, ids in zip(self.words, found, strict=True) if not ids]
        if empty:
            raise ConfigError(f"the tokenizer makes no token of {empty[0]!r} in the template")
        return found


def _check(text: str, tags: list[re.Match[str]]) -> None:
    problems = []
    stray = re.findall(r"<T[^>]*>", _TAG.sub("", text))
    if stray:
        problems.append(f"{stray[0]} is not understood: write <T>, <T*5> or <T1>")
    if not tags:
        problems.append("it has no virtual token: write <T>, <T*5> or <T1>")
    numbers = {int(tag[1]) for tag in tags if tag[1]}
    if numbers and any(not tag[1] for tag in tags):
        problems.append("numbered and unnumbered virtual tokens do not go together")
    if any(tag[1] and tag[2] for tag in tags):
        problems.append("a numbered virtual token is one token and has no count")
    if numbers and numbers != set(range(1, len(numbers) + 1)):
        problems.append(f"the virtual tokens must be numbered from 1 without gaps; they are {sorted(numbers)}")
    if any(tag[2] and not 1 <= int(tag[2]) <= _LARGEST for tag in tags):
        problems.append(f"a count must be from 1 to {_LARGEST}")
    if problems:
        raise ConfigError(f"the template {text!r}: {'; '.join(problems)}")


def _words(text: str) -> list[int | str]:
    """White space alone separates; otherwise what is written, without white space at its end."""
    return [text.rstrip()] if text.strip() else []
