"""The directory of a run: what it may contain before a run, and what is cleared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.disk.files import atomic_write_text
from byway.errors import ConfigError, RunError
from byway.recipe.checks import check_paths
from byway.train.checkpoint import FOLDER, newest, numbered
from byway.train.reporting.log import METRICS, TENSORBOARD

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["RECIPE", "Place", "claim", "inspect"]

RECIPE = "recipe.yaml"
RESULTS = ("adapter", "loss.png", "report.html")


@dataclass(frozen=True)
class Place:
    """The output of a run. ``resume``: the checkpoint to continue from, or None; ``notes``: what was found there."""

    path: Path
    resume: Path | None
    notes: tuple[str, ...]


def inspect(recipe: Recipe, *, resume: bool, overwrite: bool) -> Place:
    """Check the recipe's paths and the contents of its output directory. Nothing is changed.

    A directory in which a run failed before its first checkpoint counts as empty, with and without `resume`.

    Raises:
        ConfigError: a path cannot be used, or the directory holds a run and neither `resume` nor `overwrite` is given.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other", "choose one")
    path = Path(recipe.output).expanduser()
    barren = _barren(path)
    check_paths(recipe, resume=resume and not barren, overwrite=overwrite or barren)
    if barren:
        return Place(path, None, (f"{path} holds a run that failed before its first checkpoint: starting from step 0",))
    if not resume:
        return Place(path, None, ())
    checkpoint, problems = newest(path / FOLDER)
    if checkpoint is None:
        lines = "\n".join(["there is no complete checkpoint to resume from:", *(f"  {problem}" for problem in problems)])
        raise ConfigError(f"{path}: {lines}", "--overwrite starts over")
    notes = [*problems, f"resuming from {checkpoint}"] if problems else [f"resuming from {checkpoint}"]
    return Place(path, checkpoint, tuple(notes))


def _barren(path: Path) -> bool:
    """True if a run started here and left nothing to resume from or to use."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set[str]()
    begun = {RECIPE, METRICS}
    return bool(names) and names <= {*begun, TENSORBOARD, FOLDER} and bool(names & begun) and not numbered(path / FOLDER)


def claim(place: Place, recipe: Recipe) -> None:
    """Prepare the directory; a new run starts without the files of an earlier one. From here on it is written to."""
    path = place.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in (path, path / FOLDER):  # leftovers of a killed writer
            for entry in folder.iterdir() if folder.is_dir() else ():
                if entry.name.startswith(".") and ".byway-" in entry.name:
                    _remove(entry)
        if place.resume is None:
            for name in (FOLDER, TENSORBOARD, METRICS, *RESULTS):
                _remove(path / name)
    except OSError as error:
        raise RunError(f"cannot prepare {path}: {error.strerror} ({error.filename})") from error
    atomic_write_text(path / RECIPE, recipe.to_yaml())


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
