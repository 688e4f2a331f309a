"""The methods: a FILE in this folder is a method, and ``method.name`` in a recipe is its name; a FOLDER holds what several methods share.

A method of one's own is named by import path, ``"mypackage.toy:Toy"``; nothing is imported that is not asked for.
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
    """The methods that exist, by name, without importing any."""
    return _REGISTRY.names()


def load(name: str) -> type[Method]:
    """The method class of that name, or of that import path (``"package.module:Class"``).

    Raises:
        ConfigError: there is no such method, or the import path leads to none.
    """
    return _REGISTRY.load(name)


def of_peft_config(config: Mapping[str, Any], extra: tuple[type[Method], ...] = ()) -> type[Method] | None:
    """The method that a peft configuration describes, among `extra` and those here; None if none does."""
    return next((m for m in (*extra, *(load(n) for n in names())) if m.reads_peft(config)), None)
