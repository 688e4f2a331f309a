"""The exceptions that Byway raises.

::

    BywayError                     exit code
    ├── ConfigError   ValueError       2      a recipe, an option or a base that cannot be used
    ├── TargetError   LookupError      2      a module, layer or pattern that is not in the model
    ├── AdapterError  ValueError       2      an adapter that does not fit, in memory or on disk
    ├── DataError     ValueError       2      rows that cannot be read or trained on
    ├── NotMergeable  TypeError        2      a side path that cannot be folded into weights
    └── RunError      RuntimeError     3      work that failed midway; what was saved is intact

Each class also derives from the builtin exception next to it, so ``except ValueError`` works. A message names the
thing, the place and the reason. What to do about it goes into ``hint``, which is printed on its own line. All of them
can be pickled, so that ranks can send them to each other. To add one, subclass :class:`BywayError` and a builtin, and
set ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "BywayError",
    "ConfigError",
    "DataError",
    "NotMergeable",
    "RunError",
    "TargetError",
    "listed",
    "nearest",
    "together",
]


class BywayError(Exception):
    """Base class of Byway's errors. ``hint``: what to do, on one line, or ``""``."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(BywayError, ValueError):
    """A recipe, an option or a base model cannot be used. Found before work starts."""


class TargetError(BywayError, LookupError):
    """A module, layer index or pattern matches nothing in the model."""


class AdapterError(BywayError, ValueError):
    """An adapter, in memory or on disk, does not fit the model or the request."""


class DataError(BywayError, ValueError):
    """Rows cannot be read or trained on."""


class NotMergeable(BywayError, TypeError):
    """A side path cannot be expressed in the base's weights (a prompt, a ladder, a non-linear adapter)."""


class RunError(BywayError, RuntimeError):
    """Work failed midway. What was saved before is intact."""

    exit_code = 3


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``"did you mean 'q_proj'?"`` for the option closest to `word`, or ``""`` if none is close."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(options)), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Return the names sorted and comma-separated, the first `limit` of them. For hints such as "there are: ..."."""
    unique = sorted(dict.fromkeys(names))
    tail = f", … {len(unique) - limit} more" if len(unique) > limit else ""
    return ", ".join(unique[:limit]) + tail


def counted(count: int, thing: str) -> str:
    """Return ``1 step`` or ``1,024 steps``; `thing`: the singular of a noun whose plural ends in s."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def together(problems: Sequence[tuple[str, str]], where: str = "") -> tuple[str, str]:
    """Combine several (message, hint) into the (message, hint) of one error. A single one is returned unchanged.

    `where`: the file that the problems are in.
    """
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {message} ({hint})" if hint else f"  {message}" for message, hint in problems]
    return "\n".join([f"{len(problems)} problems{f' in {where}' if where else ''}:", *lines]), ""
