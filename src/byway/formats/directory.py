"""The directory that an adapter's files lie in: find it, recognize it, write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from byway.base.tokenizer import SAVED_FILES
from byway.core.disk.files import atomic_directory, write_safetensors
from byway.errors import AdapterError, listed, nearest
from byway.formats import formats

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["README", "config_names", "find_adapter", "holds_adapter", "write"]

README = "README.md"


def config_names() -> tuple[str, ...]:
    """Return the names of the files by which an adapter's directory is recognized, one or more formats each."""
    return tuple(dict.fromkeys(format.files[0] for format in formats()))


def holds_adapter(path: Path) -> bool:
    """True if an adapter's configuration lies in the directory `path` itself."""
    return any((path / config).is_file() for config in config_names())


def find_adapter(path: Path) -> Path:
    """Return `path` if it holds an adapter.

    Raises:
        AdapterError: it does not; the message says what is there instead.
    """
    usual = config_names()[0]
    if not path.exists():
        there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        adapters = [name for name in there if holds_adapter(path.parent / name)]
        others = f"adapters in {path.parent}: {listed(adapters, 10)}" if adapters else ""
        raise AdapterError(f"there is no adapter at {path}: no such directory", nearest(path.name, there) or others)
    if not path.is_dir():
        raise AdapterError(
            f"{path} is a file; an adapter is a directory with {usual}", "unpack an archive first; of a single file pass its directory"
        )
    if holds_adapter(path):
        return path
    below = sorted(str(entry.parent) for config in config_names() for entry in path.glob(f"*/{config}"))
    if below:
        raise AdapterError(f"{path} holds no adapter itself, but there are some below it: {listed(below)}", "pass one of these")
    content = listed((entry.name for entry in path.iterdir()), 10) or "nothing"
    raise AdapterError(f"{path} holds no {usual}; it holds: {content}")


def write(directory: Path, texts: Mapping[str, str], tensors: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> None:
    """Write an adapter's files into `directory` itself, replacing an adapter that is there in one step.

    Args:
        texts: file name → content.
        tensors: name of a safetensors file → (tensors, metadata).

    Raises:
        AdapterError: a tensor is not finite, or `directory` holds something other than an adapter.
        RunError: the disk refused. In both cases `directory` is unchanged.
    """
    everything = [(key, tensor) for contents, _ in tensors.values() for key, tensor in contents.items()]
    broken = [key for key, tensor in everything if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"the adapter holds NaN or infinity, in {', '.join(broken[:10])}", "load an earlier checkpoint")
    own = {README, *SAVED_FILES, *(file for format in formats() for file in format.files)}
    with atomic_directory(directory, replace=lambda old: holds_adapter(old) and {entry.name for entry in old.iterdir()} <= own) as new:
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for name, (contents, metadata) in tensors.items():
            write_safetensors(new / name, contents, metadata)
