"""Adapter files: a file or folder here is a format and holds one class derived from ``Format``.

``load`` and ``save`` ask the formats in turn. ``directory`` finds and writes an adapter's directory, ``record`` has
the checks that all formats share.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from byway.core.registry import Registry

if TYPE_CHECKING:
    from byway.formats.format import Format

__all__ = ["formats"]

_REGISTRY: Registry[Format] = Registry(
    sys.modules[__name__],
    "file format",
    "byway.formats.format:Format",
    folders=True,
    apart=("classes", "directory", "format", "load", "loralib", "record", "save"),
)


def formats() -> tuple[Format, ...]:
    """Return the file formats in the order in which they are asked to read a directory or to save an adapter."""
    return tuple(sorted((_REGISTRY.load(name)() for name in _REGISTRY.names()), key=lambda format: format.order))
