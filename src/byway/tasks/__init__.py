"""The tasks: how rows are read and encoded, the head they need, their loss and metrics.

A FILE in this folder is a task, and its name is a value of ``data.task``. To add one, write a file with one subclass of
:class:`byway.tasks.task.Task`. Name a task of your own by import path: ``data.task: "mypackage.toy:Toy"``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from byway.core.registry import Registry

if TYPE_CHECKING:
    from byway.tasks.task import Task

__all__ = ["load", "names"]

_REGISTRY: Registry[Task[Any]] = Registry(sys.modules[__name__], "task", "byway.tasks.task:Task", apart=("task", "causal_lm"))


def names() -> tuple[str, ...]:
    """Return the names of the tasks, without importing any."""
    return _REGISTRY.names()


def load(name: str) -> type[Task[Any]]:
    """Return the task class of that name, or of that import path (``"package.module:Class"``).

    Raises:
        ConfigError: there is no such task, or the import path does not lead to one.
    """
    return _REGISTRY.load(name)
