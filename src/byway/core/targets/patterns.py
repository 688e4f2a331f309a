"""Users' regular expressions, matched with limits on time and memory.

An expression must be valid for Python's ``re``. The ``regex`` package (a dependency of transformers) matches it, since
it accepts the same expressions and supports a time limit.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

from byway.errors import TargetError

__all__ = ["LONGEST", "SECONDS", "Pattern", "compile_pattern"]

LONGEST = 500
"""Maximum number of characters in an expression."""
SECONDS = 0.3
"""Maximum time for matching one expression against all paths."""
_MOST_COPIES = 1000
"""Maximum product of the bounds of counted repeats, which are unrolled at compilation and take memory in proportion."""

_BRACE = re.compile(r"\\.|\{(\d+)\}|\{(\d*),(\d*)\}|(\{)", re.DOTALL)


@dataclass
class Pattern:
    """A compiled expression with a time budget."""

    shown: str
    compiled: Any
    left: float = SECONDS

    def matches(self, path: str) -> bool:
        """True if all of `path` matches. Raises :class:`TargetError` when the time budget is used up."""
        begun = time.monotonic()
        try:
            return self.compiled.fullmatch(path, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise TargetError(
                f"the regular expression {self.shown!r} takes longer than {SECONDS:g} s to match",
                "remove nested repetitions such as (a+)+",
            ) from None
        finally:
            self.left -= time.monotonic() - begun


def compile_pattern(text: str, wrap: str = "{}") -> Pattern:
    """Compile `text`, inserted into `wrap`. Raises :class:`TargetError` if it is invalid, too long or too large."""
    import regex

    if len(text) > LONGEST:
        raise TargetError(f"the regular expression {text[:40]!r}... has {len(text)} characters; the limit is {LONGEST}", "shorten it")
    try:
        re.compile(text)
        _check_repeats(text)
        return Pattern(text, regex.compile(wrap.replace("{}", text)))
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise TargetError(f"{text!r} is not a valid regular expression: {error}", "correct it, or give names as a list") from None


def _check_repeats(text: str) -> None:
    """Reject repeats that unroll into too much, and other braces, which ``regex`` reads differently from ``re``."""
    copies = []
    for found in _BRACE.finditer(text):
        count, low, high, stray = found.groups()
        if stray:
            what = f"the regular expression {text!r} has a brace that is not a repeat such as {{2,3}}"
            raise TargetError(what, "module paths contain no braces")
        copies += [int(number) for number in (count, high or low) if number]
    if math.prod(max(number, 1) for number in copies) > _MOST_COPIES:
        raise TargetError(f"the counted repeats of the regular expression {text!r} unroll into more than {_MOST_COPIES}", "use * or +")
