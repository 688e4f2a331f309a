"""A folder as a registry: each file in it defines one class of a kind, and the file's name is the entry's name.

Methods, tasks, levers and file formats are registered this way: adding one means adding a file. A user's own class is
named by its import path, ``"mypackage.toy:Toy"``. Only what is asked for is imported.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Generic, TypeVar

from byway.errors import ConfigError, listed, nearest

__all__ = ["IMPORT_PATH", "Registry", "entries"]

T = TypeVar("T")

IMPORT_PATH = r"^\w+(\.\w+)*:\w+$"
"""``package.module:Class``, as a regular expression."""


def entries(folders: Iterable[str], *, apart: Sequence[str] = (), packages: bool = False) -> tuple[str, ...]:
    """The names of the files in `folders`, sorted, without those in `apart`; also of packages in them if `packages`."""
    found = (m for m in pkgutil.iter_modules(folders) if packages or not m.ispkg)
    return tuple(sorted(m.name for m in found if not m.name.startswith("_") and m.name not in apart))


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes of one kind in one package."""

    package: ModuleType
    kind: str
    """Name of an entry in messages: ``method``."""
    base: str
    """The class that entries derive from, as ``module:Class``; imported with the first entry."""
    folders: bool = False
    """True if an entry may be a folder; otherwise folders hold what several entries share."""
    apart: Sequence[str] = ()
    """Files in the package that define no entry."""

    def names(self) -> tuple[str, ...]:
        """The entries by name, sorted, without importing any."""
        return entries(self.package.__path__, apart=self.apart, packages=self.folders)

    def load(self, name: str) -> type[T]:
        """Return the class of that name, or of that import path (``"package.module:Class"``).

        Raises:
            ConfigError: there is no such entry, its file does not define exactly one class of the kind, or the import
                path does not lead to one.
        """
        if ":" in name:
            return self._imported(name)
        there = self.names()
        if name not in there:
            raise ConfigError(f"there is no {self.kind} {name!r} (there are: {listed(there)})", nearest(name, there))
        module = importlib.import_module(f"{self.package.__name__}.{name}")
        found = [c for c in self._classes(module).values() if c.__module__ == module.__name__ and not inspect.isabstract(c)]
        if len(found) != 1:
            raise ConfigError(f"{module.__name__} defines {len(found)} {self.kind} classes; it must define exactly one")
        return found[0]

    def _classes(self, module: ModuleType) -> dict[str, type[T]]:
        home, _, name = self.base.partition(":")
        base: type[T] = vars(importlib.import_module(home))[name]
        return {
            key: value for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base) and value is not base
        }

    def _imported(self, path: str) -> type[T]:
        if not re.fullmatch(IMPORT_PATH, path):
            raise ConfigError(f"{self.kind} {path!r} is not an import path", "an import path looks like package.module:Class")
        module_name, _, class_name = path.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(f"{self.kind} {path!r}: cannot import {module_name!r} ({error})", "is its folder on PYTHONPATH?") from error
        except Exception as error:  # the user's own code, which may raise anything
            raise ConfigError(f"{self.kind} {path!r}: importing {module_name!r} fails ({type(error).__name__}: {error})") from error
        found = self._classes(module)
        if class_name not in found:
            there = listed(found) or "none"
            raise ConfigError(
                f"{self.kind} {path!r}: {module_name} has no {self.base.partition(':')[2]} named {class_name!r} (there are: {there})"
            )
        return found[class_name]
