"""Decide what a base's name refers to, without using the network.

In this order: the built-in default, an existing directory, a ``.gguf`` file, a missing path (an error that names its
nearest sibling), a hub id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from byway.core.disk.paths import path_problem
from byway.core.fields import shown
from byway.errors import ConfigError, listed, nearest

__all__ = ["BUILT_IN", "Source", "locate", "on_this_disk"]

BUILT_IN = "smollm2-135m-instruct"

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
PATH_PREFIXES = (".", "~", "/", "\\")
WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of a base. ``name``: as the user wrote it; ``path``: its directory or file, for kinds on this disk."""

    kind: Literal["built-in", "directory", "gguf", "hub"]
    name: str
    path: Path = Path()


def locate(name_or_path: str | os.PathLike[str]) -> Source:
    """Return the origin that `name_or_path` refers to; a ``Path`` object is never a hub id. Raises ConfigError."""
    name = os.fspath(name_or_path)
    why = path_problem(name) if isinstance(name, str) and name.strip() else "is empty"
    if why:
        message = f"the base {shown(name)} is neither a path nor a name: it {why}"
        raise ConfigError(message, f"use a directory, a .gguf file, a hub id, or {BUILT_IN!r}")
    if name == BUILT_IN:
        return Source(kind="built-in", name=name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(kind="directory", name=name, path=path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            if path.name in ("config.json", "adapter_config.json") or path.suffix in WEIGHT_SUFFIXES:
                hint = f"use the directory it is in: {str(path.parent)!r}"
            else:
                hint = "a base is a directory with config.json and safetensors weights, a .gguf file, or a hub id"
            raise ConfigError(f"the base {name!r} is a file, but not a .gguf file", hint)
        return Source(kind="gguf", name=name, path=path)
    if (
        isinstance(name_or_path, Path)
        or name.startswith(PATH_PREFIXES)
        or name.endswith(("/", *WEIGHT_SUFFIXES))
        or name.count("/") > 1
        or "\\" in name
    ):
        raise ConfigError(f"the base {name!r} does not exist: no such directory or file", _sibling_hint(path))
    if close := nearest(name.lower(), [BUILT_IN]) if "/" not in name else "":
        raise ConfigError(f"there is no base {name!r}", close)
    if not HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"the base {name!r} is neither a path that exists nor a hub id", "a hub id looks like 'owner/name'")
    if path.parent != Path() and (sibling := _nearest_sibling(path)):
        raise ConfigError(
            f"the base {name!r} does not exist here, but {sibling} does",
            f"did you mean {str(sibling)!r}? (to use the hub id {name!r}, run where there is no directory {path.parent})",
        )
    return Source(kind="hub", name=name)


def on_this_disk(name: str) -> bool:
    """True if the base of that name is a directory or a .gguf file here."""
    try:
        return locate(name).kind in ("directory", "gguf")
    except ConfigError:
        return False


def _nearest_sibling(path: Path) -> Path | None:
    """Return the entry next to the missing `path` with the most similar name."""
    if not path.parent.is_dir():
        return None
    names = {entry.name for entry in path.parent.iterdir()}
    close = nearest(path.name, sorted(names))
    return next((path.parent / name for name in names if close == f"did you mean {name!r}?"), None)


def _sibling_hint(path: Path) -> str:
    """Return what exists next to, or above, a missing path."""
    if not path.parent.is_dir():
        above = next(folder for folder in path.parents if folder.is_dir())
        missing = path.relative_to(above).parts[0]
        sibling = _nearest_sibling(above / missing)
        return f"did you mean {str(sibling)!r}?" if sibling else f"{str(above)!r} has no entry {missing!r}"
    if sibling := _nearest_sibling(path):
        return f"did you mean {str(sibling)!r}?"
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    return f"{str(path.parent)!r} contains: {listed(names, 10)}" if names else f"{str(path.parent)!r} is empty"
