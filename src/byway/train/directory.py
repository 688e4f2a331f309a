"""The directory of a run: what it may contain before a run, what is cleared, and that only one process writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.disk.atomic import is_temporary, remove
from byway.core.disk.files import atomic_write_text
from byway.core.disk.lock import check_free, locked
from byway.errors import ConfigError, RunError
from byway.recipe.checks import check_paths
from byway.train.checkpoint import FOLDER, newest, numbered, remove_leftovers
from byway.train.reporting.log import METRICS, TENSORBOARD

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["RECIPE", "Place", "claim", "inspect", "occupied"]

RECIPE = "recipe.yaml"
RESULTS = ("adapter", "loss.png", "report.html")


@dataclass(frozen=True)
class Place:
    """The output of a run. ``resume``: the checkpoint to continue from, or None; ``notes``: what was found there."""

    path: Path
    resume: Path | None
    notes: tuple[str, ...]
    contents: tuple[tuple[str, int], ...]
    """What was there: names and times of modification."""


def inspect(recipe: Recipe, *, resume: bool, overwrite: bool, dry_run: bool = False) -> Place:
    """Check the recipe's paths and the contents of its output directory. Nothing is changed.

    A directory in which a run failed before its first checkpoint counts as empty, with and without `resume`. With
    `dry_run`, a run in the directory is only a note, even one that another process is writing.

    Raises:
        ConfigError: a path cannot be used, another process writes to the directory, or it holds a run and neither
            `resume` nor `overwrite` is given.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other", "choose one")
    path = Path(recipe.output).expanduser()
    if not dry_run:
        check_free(path)
    contents, barren = _contents(path), _barren(path)
    check_paths(recipe, resume=resume and not barren, overwrite=overwrite or barren or dry_run)
    if barren:
        return Place(path, None, (f"{path} holds a run that failed before its first checkpoint: starting from step 0",), contents)
    if not resume:
        there = f"{path} already contains a run: --resume continues it, --overwrite replaces it"
        return Place(path, None, (there,) if contents and not overwrite else (), contents)
    checkpoint, problems = newest(path / FOLDER)
    if checkpoint is None:
        lines = "\n".join(["there is no complete checkpoint to resume from:", *(f"  {problem}" for problem in problems)])
        raise ConfigError(f"{path}: {lines}", "--overwrite starts over")
    notes = [*problems, f"resuming from {checkpoint}"] if problems else [f"resuming from {checkpoint}"]
    return Place(path, checkpoint, tuple(notes), contents)


def _contents(path: Path) -> tuple[tuple[str, int], ...]:
    """Return the entries of a run's directory and of its checkpoints."""
    entries = [entry for folder in (path, path / FOLDER) if folder.is_dir() for entry in folder.iterdir()]
    return tuple(sorted((str(entry), entry.lstat().st_mtime_ns) for entry in entries if not entry.name.startswith(".")))


def _barren(path: Path) -> bool:
    """True if a run started here and left nothing to resume from or to use."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set[str]()
    begun = {RECIPE, METRICS}
    return bool(names) and names <= {*begun, TENSORBOARD, FOLDER} and bool(names & begun) and not numbered(path / FOLDER)


@contextmanager
def occupied(place: Place) -> Iterator[None]:
    """Within this context no other process writes to the directory of the run. It is still as :func:`inspect` found it.

    Raises:
        ConfigError: another process writes to it, or has since it was inspected.
    """
    with locked(place.path):
        if _contents(place.path) != place.contents:
            why = f"{place.path} was changed by another process while this run was being prepared"
            raise ConfigError(why, "start again: it is inspected again")
        yield


def claim(place: Place, recipe: Recipe) -> None:
    """Prepare the directory; a new run starts without the files of an earlier one. From here on it is written to."""
    path = place.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        for entry in filter(is_temporary, path.iterdir()):
            remove(entry)
        remove_leftovers(path / FOLDER)
        if place.resume is None:
            for name in (FOLDER, TENSORBOARD, METRICS, *RESULTS):
                remove(path / name)
    except OSError as error:
        raise RunError(f"cannot prepare {path}: {error.strerror} ({error.filename})") from error
    atomic_write_text(path / RECIPE, recipe.to_yaml())
