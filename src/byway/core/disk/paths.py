"""Names that no file system takes, found where they are read: the system would refuse them with an error of its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["half_character", "path_problem"]

MAX_NAME = 255
MAX_PATH = 4096
"""Bytes, as on Linux; the terminating zero counts."""


def half_character(text: str) -> str:
    """Return the first lone surrogate of `text` as ``U+D800``, or ``""``. No file can store it."""
    return next((f"U+{ord(char):04X}" for char in text if "\ud800" <= char <= "\udfff"), "")


def path_problem(text: str) -> str:
    """Say why `text` cannot be the name of a file or directory on any system, or return ``""``."""
    if "\0" in text:
        return "contains a zero byte"
    if half := half_character(text):
        return f"contains {half}, half of a character"
    longest = max(len(part.encode()) for part in text.split("/"))
    if longest > MAX_NAME:
        return f"has a part of {longest:,} bytes; file systems allow {MAX_NAME}"
    if len(text.encode()) >= MAX_PATH:
        return f"has {len(text.encode()):,} bytes; file systems allow fewer than {MAX_PATH:,}"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return "begins with the home directory of a user who does not exist"
    return ""
