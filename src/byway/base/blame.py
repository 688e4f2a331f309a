"""The boundary to transformers: what it raises about somebody's files becomes a ConfigError that names them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from byway.errors import BywayError, ConfigError

__all__ = ["blaming"]

_PANIC = "PanicException"
"""What a Rust library raises when it panics; it derives from BaseException, and no package exports it."""


@contextlib.contextmanager
def blaming(owner: str, part: str, hint: str = "") -> Iterator[None]:
    """Turn what transformers raises about the files of `owner`, of any class, into a ConfigError that names it."""
    try:
        yield
    except BywayError:
        raise
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != _PANIC:
            raise  # an interruption
        reason = " ".join(str(failure).split())
        reason = reason if " " in reason else f"{type(failure).__name__} {reason}".rstrip()
        if "trust_remote_code" in reason:
            reason, hint = "it needs code that comes with it", "such code is not run; use a base whose files transformers reads by itself"
        raise ConfigError(f"{owner} cannot be loaded: transformers refuses {part}: {reason[:400]}", hint) from failure
