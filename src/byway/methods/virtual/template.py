"""A template such as ``"<T1> <T2> {text} Answer: <T3>"``: virtual tokens and fixed words around the text of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from byway.errors import ConfigError

__all__ = ["Template", "token_ids"]

TEXT = "{text}"
_TAG = re.compile(r"<T(\d*)(?:\*(\d+))?>")
_LARGEST = 100_000
"""More virtual tokens than fit into any context; a larger number is a typing error."""


@dataclass(frozen=True)
class Template:
    """The pieces before and after the text. A piece is the index of a virtual token, or a string of fixed words."""

    before: tuple[int | str, ...]
    after: tuple[int | str, ...] = ()

    @classmethod
    def plain(cls, count: int) -> Template:
        """Return the template of `count` virtual tokens, then the text."""
        return cls(tuple(range(count)))

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template: ``<T>`` is one virtual token, ``<T*5>`` five, ``<T3>`` the third, ``{text}`` the row.

        A numbered token may appear more than once. Fixed words are frozen. Each piece of them is tokenized by itself,
        as written, without trailing white space.

        Raises:
            ConfigError: no or several ``{text}``, no virtual token, gaps in the numbers, or numbered and unnumbered
                tokens in one template.
        """
        parts = text.split(TEXT)
        if len(parts) != 2:
            raise ConfigError(f"the template {text!r} contains {{text}} {len(parts) - 1} times; it must contain it once")
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
        """All pieces, in order."""
        return (*self.before, *self.after)

    @property
    def count(self) -> int:
        """Number of different virtual tokens."""
        return len({piece for piece in self.pieces if isinstance(piece, int)})

    @property
    def words(self) -> tuple[str, ...]:
        """The fixed words, piece by piece."""
        return tuple(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def is_plain(self) -> bool:
        """True if it consists of virtual tokens before the text, each once."""
        return self == Template.plain(self.count)


def token_ids(tokenizer: Any, text: str, vocabulary: int) -> list[int]:
    """Return the token ids of `text`, without special tokens.

    Raises:
        ConfigError: there are none, or the base's vocabulary is smaller than the tokenizer's.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError(f"the tokenizer gives no tokens for {text!r}")
    if max(ids) >= vocabulary:
        raise ConfigError("the tokenizer has more tokens than the base", "pass the base's own tokenizer")
    return ids


def _check(text: str, tags: list[re.Match[str]]) -> None:
    problems = []
    stray = re.findall(r"<T[^>]*>", _TAG.sub("", text))
    if stray:
        problems.append(f"{stray[0]} is not a virtual token: write <T>, <T*5> or <T1>")
    if not tags:
        problems.append("it has no virtual token: write <T>, <T*5> or <T1>")
    numbers = {int(tag[1]) for tag in tags if tag[1]}
    if numbers and any(not tag[1] for tag in tags):
        problems.append("numbered and unnumbered virtual tokens do not go together")
    if any(tag[1] and tag[2] for tag in tags):
        problems.append("a numbered virtual token is a single token and takes no count")
    if numbers and numbers != set(range(1, len(numbers) + 1)):
        problems.append(f"the virtual tokens must be numbered from 1 without gaps; they are {sorted(numbers)}")
    if any(tag[2] and not 1 <= int(tag[2]) <= _LARGEST for tag in tags):
        problems.append(f"a count must be from 1 to {_LARGEST}")
    if problems:
        raise ConfigError(f"the template {text!r}: {'; '.join(problems)}")


def _words(text: str) -> list[int | str]:
    """Return the words without trailing white space; nothing for white space alone."""
    return [text.rstrip()] if text.strip() else []
