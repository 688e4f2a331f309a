"""The names of methods and of their adapters in a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from byway import methods as registry

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["adapter_names", "method_name"]


def method_name(method: type[Method]) -> str:
    """Return the name of a method in a recipe: that of its file in ``methods/``, or ``"package.module:Class"``."""
    home, _, name = method.__module__.rpartition(".")
    return name if home == registry.__name__ else f"{method.__module__}:{method.__qualname__}"


def adapter_names(methods: Sequence[Method]) -> tuple[str, ...]:
    """Return the methods' adapter names: the method's name, with ``-2`` for a repeat; ``default`` for a single one."""
    if len(methods) == 1:
        return ("default",)
    bare = [re.sub(r"[^A-Za-z0-9_-]", "_", method_name(type(m)).rpartition(":")[2]) for m in methods]
    return tuple(name if n == 0 else f"{name}-{n + 1}" for name, n in ((b, bare[:i].count(b)) for i, b in enumerate(bare)))
