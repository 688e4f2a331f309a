"""Rows that cannot be used: where they are, and the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from byway.errors import DataError

__all__ = ["MAX_DEPTH", "Bad", "BadRow", "BadRows", "parsed", "plain", "snippet"]


MAX_DEPTH = 100
"""Maximum nesting depth of a row; Python's own limit differs between machines and versions."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used: its address, and the reason with at most 80 characters of context."""

    where: str
    reason: str


class BadRow(Exception):
    """Raised while one row is read or converted; the caller adds its address and collects it in :class:`BadRows`."""


@dataclass
class BadRows:
    """Collect bad rows: raise all of them at once, or (``skip=True``) count them and keep the first reasons."""

    skip: bool = False
    count: int = 0
    first: list[Bad] = field(default_factory=list)

    def copy(self) -> BadRows:
        """Return an independent copy, to count further bad rows of the same source."""
        return BadRows(self.skip, self.count, list(self.first))

    def add(self, where: str, reason: str) -> None:
        """Count one; the reasons of the first 20 are kept."""
        self.count += 1
        if len(self.first) < 20:
            self.first.append(Bad(where, reason))

    def check(self) -> None:
        """Raise :class:`DataError` with the first five and the total, unless bad rows are to be skipped."""
        if self.skip or not self.count:
            return
        shown = [f"{bad.where}: {bad.reason}" for bad in self.first[:5]]
        if self.count > len(shown):
            shown.append(f"… and {self.count - len(shown)} more bad rows")
        raise DataError("\n".join(shown), hint="correct the rows, or leave bad rows out with --skip-bad-rows (skip_bad=True)")


def parsed(text: str) -> Any:
    """Parse one JSON value strictly: no NaN, no key twice in one object. The BadRow says what is wrong and where."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        cut = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        what, at = ("is cut off", len(text)) if cut else ("is not JSON", error.pos)
        raise BadRow(f"{what} ({error.msg.removesuffix(' at')} at column {error.pos + 1}): {snippet(text, at)}") from None
    except RecursionError:
        raise BadRow(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise BadRow(f"is not readable JSON ({snippet(str(error))})") from None


def _no_constant(name: str) -> Any:
    raise BadRow(f"contains {name}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def plain(value: Any) -> None:
    """Raise BadRow if `value` is nested too deeply, or has half a surrogate pair or a key that is not a string."""
    stack = [(value, 1)]
    while stack:
        entry, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise BadRow(f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(entry, str):
            _no_surrogate(entry)
        elif isinstance(entry, dict):
            for key, inner in entry.items():
                if not isinstance(key, str):
                    raise BadRow(f"has a key that is not a string: {snippet(repr(key))}")
                _no_surrogate(key)
                stack.append((inner, depth + 1))
        elif isinstance(entry, (list, tuple)):
            stack.extend((inner, depth + 1) for inner in entry if isinstance(inner, (str, dict, list, tuple)))


def _no_surrogate(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"contains half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is not a character") from None


def snippet(text: str, at: int = 0, width: int = 60) -> str:
    """Return at most `width` characters of `text` around position `at`, printable and on one line."""
    start = max(0, at - width // 2) if len(text) > width else 0
    cut = text[start : start + width]
    shown = "".join(ch if ch.isprintable() else " " if ch.isspace() else "·" for ch in cut)
    return ("…" if start else "") + shown + ("…" if start + width < len(text) else "")
