"""Regular expressions from users, matched so that none can hang or exhaust memory.

An expression must be valid for Python's ``re``; it is matched by the ``regex`` package (a dependency of transformers), which reads the same
expressions and can be given a time limit.
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
"""Characters in an expression."""
SECONDS = 0.3
"""Processor time that one expression may take over all the paths it is asked about."""
_MOST_COPIES = 1000
"""Counted repeats are unrolled when compiled: the product of their bounds limits the memory that takes."""

_BRACE = re.compile(r"\\.|\{(\d+)\}|\{(\d*),(\d*)\}|(\{)", re.DOTALL)


@dataclass
class Pattern:
    """A compiled expression with a budget of time."""

    shown: str
    compiled: Any
    left: float = SECONDS

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` matches; a :class:`TargetError` once the budget is spent."""
        begun = time.monotonic()
        try:
            return self.compiled.fullmatch(path, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise TargetError(
                f"the regular expression {self.shown!r} takes longer than {SECONDS:g} s to match",
                "remove nested repeats such as (a+)+",
            ) from None
        finally:
            self.left -= time.monotonic() - begun


def compile_pattern(text: str, wrap: str = "{}") -> Pattern:
    """`text`, put into the expression `wrap`, ready to be matched; a :class:`TargetError` if it is invalid, too long or too large."""
    import regex

    if len(text) > LONGEST:
        raise TargetError(f"the regular expression {text[:40]!r}... has {len(text)} characters, more than {LONGEST}", "shorten it")
    try:
        re.compile(text)
        _check_repeats(text)
        return Pattern(text, regex.compile(wrap.replace("{}", text)))
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise TargetError(f"{text!r} is not a valid regular expression: {error}", "write names in a list, or correct it") from None


def _check_repeats(text: str) -> None:
    """Refuse counted repeats that would unroll into too much, and braces that are no repeat (``regex`` gives them a meaning of its own)."""
    copies = []
    for found in _BRACE.finditer(text):
        count, low, high, stray = found.groups()
        if stray:
            raise TargetError(f"the regular expression {text!r} has a brace that is no repeat such as {{2,3}}", "no module path has braces")
        copies += [int(number) for number in (count, high or low) if number]
    if math.prod(max(number, 1) for number in copies) > _MOST_COPIES:
        raise TargetError(f"the counted repeats of the regular expression {text!r} unroll into more than {_MOST_COPIES}", "use * or +")
