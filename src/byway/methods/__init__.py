"""The methods. A file in this folder is a method with that name; a folder is machinery that several methods share.

A method of your own is named by its import path, ``"mypackage.toy:Toy"``. Modules are imported only when asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from byway.core.registry import Registry

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["load", "names", "of_peft_config"]

_REGISTRY: Registry[Method] = Registry(sys.modules[__name__], "method", "byway.core.method:Method")


def names() -> tuple[str, ...]:
    """Return the names of the methods, without importing any."""
    return _REGISTRY.names()


def load(name: str) -> type[Method]:
    """Return the method class with that name, or at that import path (``"package.module:Class"``).

    Raises:
        ConfigError: there is no such method.
    """
    return _REGISTRY.load(name)


def of_peft_config(config: Mapping[str, Any], extra: tuple[type[Method], ...] = ()) -> type[Method] | None:
    """Return the method, in `extra` or here, that a peft configuration describes, or None."""
    return next((m for m in (*extra, *(load(n) for n in names())) if m.peft is not None and m.peft.reads(config)), None)
