"""What an adapter's directory holds."""

from __future__ import annotations

from pathlib import Path

from byway.errors import AdapterError, listed, nearest
from byway.formats.peft.config import CONFIG

__all__ = ["CONFIGS", "NATIVE", "PREFIX", "README", "WEIGHTS", "find_adapter", "is_adapter_directory"]


CONFIGS = ("adapter_config.json", "byway_adapter.json")
"""The file by which an adapter's directory is known: peft's, or Byway's own for methods that peft has no name for."""


def find_adapter(path: Path) -> Path:
    """`path`, if an adapter's configuration lies in it; otherwise an AdapterError that says what is there instead."""
    if not path.exists():
        raise AdapterError(f"there is no adapter at {path}: no such directory", _neighbours(path))
    if not path.is_dir():
        raise AdapterError(
            f"{path} is a file; an adapter is a directory with {CONFIGS[0]}", "unpack an archive first; of a single file pass its directory"
        )
    if any((path / config).is_file() for config in CONFIGS):
        return path
    below = sorted(str(entry.parent) for config in CONFIGS for entry in path.glob(f"*/{config}"))
    if below:
        raise AdapterError(f"{path} holds no adapter itself, but there are some below it: {listed(below)}", "pass one of these")
    content = listed((entry.name for entry in path.iterdir()), 10) or "nothing"
    raise AdapterError(f"{path} holds no {CONFIGS[0]}; it holds: {content}")


def _neighbours(path: Path) -> str:
    there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    adapters = [name for name in there if any((path.parent / name / config).is_file() for config in CONFIGS)]
    return nearest(path.name, there) or (f"adapters in {path.parent}: {listed(adapters, 10)}" if adapters else "")


PREFIX = "base_model.model."


WEIGHTS = "adapter_model.safetensors"


README = "README.md"


NATIVE = ("byway_adapter.json", "byway_adapter.safetensors")


LIBRARY = ("adapter.safetensors", "head_config.json", "model_head.safetensors")  # adapters_library.py


def is_adapter_directory(path: Path) -> bool:
    """Whether `path` holds an adapter's files and nothing else, so that another adapter may take its place."""
    names = {entry.name for entry in path.iterdir()}
    return bool(names & {CONFIG, NATIVE[0]}) and names <= {CONFIG, WEIGHTS, README, *NATIVE, *LIBRARY}
