"""What can go wrong, as one small tree of exceptions.

::

    BywayError                     exit code
    ├── ConfigError   ValueError       2      a recipe, an option or a base that cannot be used
    ├── TargetError   LookupError      2      a module, layer or pattern that is not in the model
    ├── AdapterError  ValueError       2      an adapter (file) that does not fit
    ├── DataError     ValueError       2      rows that cannot be read or learnt from
    ├── NotMergeable  TypeError        2      a side path that cannot be folded into weights
    └── RunError      RuntimeError     3      work that failed midway; what was saved is intact

Each is also the builtin it stands for, so ``except ValueError`` keeps working. A message says what, where, why; what to do about it goes
into ``hint`` and is printed on a line of its own. All of them can be pickled (ranks send them to each other).
To add one: subclass :class:`BywayError` and the builtin, and set ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AdapterError", "BywayError", "ConfigError", "DataError", "NotMergeable", "RunError", "TargetError", "listed", "nearest"]


class BywayError(Exception):
    """Anything Byway refuses or fails at. ``hint``: what to do, in one line, or ``""``."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(BywayError, ValueError):
    """A recipe, an option or a base model that cannot be used; found before work starts."""


class TargetError(BywayError, LookupError):
    """A module, layer index or pattern that matches nothing it could stand for."""


class AdapterError(BywayError, ValueError):
    """An adapter, on disk or in memory, that does not fit what is asked of it."""


class DataError(BywayError, ValueError):
    """Rows that cannot be read, or from which nothing can be learnt."""


class NotMergeable(BywayError, TypeError):
    """A side path that has no equal in the base's own weights (a prompt, a ladder, a non-linear adapter)."""


class RunError(BywayError, RuntimeError):
    """Work that failed midway: what had been saved before is intact."""

    exit_code = 3


def nearest(word: str, options: Iterable[str]) -> str:
    """``"did you mean 'q_proj'?"``, or ``""`` when nothing among `options` is close to `word`."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(options)), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """The names, sorted and comma-separated, at most `limit` of them: for "there are: ..."."""
    unique = sorted(dict.fromkeys(names))
    tail = f", … {len(unique) - limit} more" if len(unique) > limit else ""
    return ", ".join(unique[:limit]) + tail
