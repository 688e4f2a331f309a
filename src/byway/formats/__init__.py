"""Adapter files: a file or folder here is a format and holds one class derived from ``Format``.

``load`` and ``save`` ask the formats in turn. ``directory`` finds and writes an adapter's directory, ``record`` has
the checks that all formats share.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.registry import Registry
from byway.errors import AdapterError

if TYPE_CHECKING:
    from byway.formats.format import Format

__all__ = ["format_of", "formats"]

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


def format_of(directory: Path) -> Format:
    """Return the format of the adapter in `directory`. Raises AdapterError if no format reads it."""
    chosen = next((format for format in formats() if format.reads(directory)), None)
    if chosen is None:
        raise AdapterError(f"{directory} is in no format that Byway reads", "save it again with the program that wrote it")
    return chosen
