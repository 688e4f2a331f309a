"""``byway init``: a recipe and a few rows to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from byway.cli import ui

__all__ = ["run"]

FILES = ("chat.yaml", "chat.jsonl")


def run(directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to write them.")] = Path()) -> None:
    """Write a recipe, chat.yaml, and 20 rows of its data, chat.jsonl, to replace by your own.

    Paths in the recipe are relative to the current directory: run it in DIRECTORY.
    """
    from importlib.resources import files

    from byway.core.disk.files import atomic_write_text
    from byway.errors import ConfigError, listed

    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{str(directory)!r} is a file", "name a directory")
    there = [name for name in FILES if (directory / name).exists()]
    if there:
        raise ConfigError(f"{str(directory)!r} already contains {listed(there)}", "choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    home = files("byway.cli") / "_init"
    for name in FILES:
        atomic_write_text(directory / name, (home / name).read_text(encoding="utf-8"))
        ui.out(str(directory / name))
    ui.note(("" if directory == Path() else f"cd {directory}; ") + "byway train chat.yaml")
