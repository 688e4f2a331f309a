"""Adapter files: one file or folder a format.

``load`` and ``save`` try the registered formats in turn; ``directory`` says what an adapter's directory holds, ``record`` has the
checks that all formats share.
"""

from __future__ import annotations

from byway.formats.directory import find_adapter
from byway.formats.load import load
from byway.formats.save import save_adapter

__all__ = ["find_adapter", "load", "save_adapter"]
