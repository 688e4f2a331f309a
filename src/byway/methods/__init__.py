"""The methods: one file each, and the folder is the registry. ``method.name`` in a recipe is the file's name.

A method of one's own is named by import path, ``"mypackage.toy:Toy"``; nothing is imported that is not asked for.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from byway.errors import ConfigError, listed, nearest

if TYPE_CHECKING:
    from byway.core import Method

__all__ = ["load", "names", "of_peft_config"]


def names() -> tuple[str, ...]:
    """The methods that exist, by name, without importing any."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(name: str) -> type[Method]:
    """The method class of that name, or of that import path (``"package.module:Class"``).

    Raises:
        ConfigError: there is no such method, or the import path leads to none.
    """
    if ":" in name:
        return _imported(name)
    there = names()
    if name not in there:
        raise ConfigError(f"there is no method {name!r} (there are: {listed(there)})", nearest(name, there))
    return _the_method_in(f"byway.methods.{name}")


def _the_method_in(module_name: str) -> type[Method]:
    from byway.core import Method

    module = importlib.import_module(module_name)
    found = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module_name]
    if len(found) != 1:
        raise ConfigError(f"{module_name} holds {len(found)} methods; a method's file holds exactly one")
    return found[0]


def _imported(path: str) -> type[Method]:
    from byway.core import Method

    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"method {path!r}: cannot import {module_name!r} ({error})", "is its folder on PYTHONPATH?") from error
    found = vars(module).get(class_name)
    if not (inspect.isclass(found) and issubclass(found, Method)):
        kinds = [k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Method) and v is not Method]
        raise ConfigError(f"method {path!r}: {module_name} has no Method named {class_name!r} (there are: {listed(kinds) or 'none'})")
    return found


def of_peft_config(config: Mapping[str, Any], extra: tuple[type[Method], ...] = ()) -> type[Method] | None:
    """The method that a peft configuration describes, among `extra` and those here; None if none does."""
    return next((m for m in (*extra, *(load(n) for n in names())) if m.reads_peft(config)), None)
