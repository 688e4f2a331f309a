"""Check the files and directories of a recipe before work starts, without writing anything and without the network."""

from __future__ import annotations

import os
from pathlib import Path

from byway.base.source import locate
from byway.errors import BywayError, ConfigError, listed, nearest, together
from byway.recipe.names import method_name
from byway.recipe.recipe import Recipe

__all__ = ["check_paths"]

RUN_FILES = frozenset({"recipe.yaml", "metrics.jsonl", "adapter", "checkpoints", "loss.png", "report.html", "tensorboard"})


def check_paths(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check the base, the data files and the output directory of `recipe`.

    Args:
        recipe: the run that is about to start.
        resume: the output directory contains a run to continue.
        overwrite: the output directory may contain a run, which will be replaced; other files in it are still refused.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[tuple[str, str]] = []
    model_directory = None
    try:
        source = locate(recipe.base.model)
        model_directory = source.path if source.kind == "directory" else None
    except BywayError as error:
        problems.append((f"base.model: {error.message}", error.hint))
    if recipe.base.quantize is not None:
        problems += [
            (
                f"base.quantize is {recipe.base.quantize}, but method.name is {method_name(type(method))}, which trains full weights",
                "use a method with a low-rank update (lora), or leave base.quantize out",
            )
            for method in recipe.method
            if not method.quantized_base
        ]
    for key, given in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        paths = (given,) if isinstance(given, str) else given or ()
        problems += [(f"{key}: {why}", hint) for path in paths for why, hint in _missing_file(path)]
    output = Path(recipe.output).expanduser()
    for start in filter(None, recipe.start):
        if not Path(start).is_dir():
            problems.append((f"method.start: there is no directory {start!r}", ""))
        elif overwrite and Path(start).resolve().is_relative_to(output.resolve()):
            problems.append((f"method.start {start!r} is inside the run that --overwrite replaces", "choose another output"))
    problems += _output_problems(output, model_directory, resume=resume, overwrite=overwrite)
    if problems:
        raise ConfigError(*together(problems))


def _missing_file(name: str) -> list[tuple[str, str]]:
    path = Path(name).expanduser()
    if name.startswith("hub:") or path.is_file():
        return []
    if path.is_dir():
        files = [p.name for p in path.iterdir() if p.is_file()]
        return [(f"{name!r} is a directory", f"name a file in it: {listed(files, 8)}" if files else "")]
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else "" if path.parent.is_dir() else f"there is no directory {str(path.parent)!r}"
    return [(f"{name!r} does not exist", hint)]


def _output_problems(output: Path, model_directory: Path | None, *, resume: bool, overwrite: bool) -> list[tuple[str, str]]:
    where = f"output {str(output)!r}"
    existing = next((p for p in (output, *output.parents) if os.path.lexists(p)), Path())
    if model_directory is not None and Path(os.path.realpath(output)).is_relative_to(os.path.realpath(model_directory)):
        return [(f"{where} is inside the base's directory {str(model_directory)!r}", "choose another directory")]
    if not existing.is_dir():
        what = "is a file" if existing == output else f"cannot be created: {str(existing)!r} is a file"
        return [(f"{where} {what}", "choose another directory")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [(f"{where} cannot be written: no permission in {str(existing)!r}", "choose another directory")]
    entries = sorted(p.name for p in output.iterdir() if not p.name.startswith(".")) if existing == output else []
    if resume and "checkpoints" not in entries:
        return [(f"{where} contains no run to resume", "start without --resume")]
    if not entries or resume:
        return []
    foreign = [name for name in entries if name not in RUN_FILES]
    if foreign:
        return [(f"{where} contains files that do not belong to a run: {listed(foreign, 5)}", "choose an empty or new directory")]
    hint = "--resume continues it, --overwrite replaces it, or choose another directory"
    return [] if overwrite else [(f"{where} already contains a run", hint)]
