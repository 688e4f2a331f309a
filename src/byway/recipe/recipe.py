"""The recipe: one training run, read from a file or a dict, checked, and written back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from byway.core.disk.paths import path_problem
from byway.core.fields import plain, shown
from byway.errors import ConfigError, nearest, together
from byway.recipe.names import method_name
from byway.recipe.reading import SECTIONS, Reading
from byway.recipe.sections import Base, Data, Engine, Train
from byway.recipe.yaml12 import MAX_BYTES, dump, parse, parse_value

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: base, methods in hook order, data, training, engine, and the output directory.

    Made from a file (:meth:`load`), from a dict (:meth:`from_dict`) or from its parts.

    Raises:
        ConfigError: a value that is not allowed, or values that do not go together.
    """

    base: Base = field(default_factory=Base)
    method: tuple[Method, ...]
    """In hook order; one method or a list in Python, one map or a list in YAML."""
    data: Data
    train: Train = field(default_factory=Train)
    engine: Engine = field(default_factory=Engine)
    output: str
    """Directory of the run, relative to the current one."""
    start: tuple[str | None, ...] = ()
    """For each method the directory of the adapter that it starts from, or None."""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """How keys of other trainers were read."""

    def __post_init__(self) -> None:
        given: Any = self.method
        object.__setattr__(self, "method", tuple(cast("Sequence[Any]", given)) if isinstance(given, (tuple, list)) else (given,))
        if isinstance(self.output, os.PathLike):
            object.__setattr__(self, "output", os.fspath(self.output))
        object.__setattr__(self, "start", (*self.start, *(None,) * len(self.method))[: len(self.method)])
        problems = [] if self.method else ["method is empty; it must contain at least one method"]
        problems += _output_problem(self.output) + contradictions(self.data, self.train)
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), *, allow_import: bool = True) -> Recipe:
        """Read a YAML recipe.

        Args:
            path: the file. overrides: key paths and YAML values that replace the file's: ``"train.epochs=1"``.
            allow_import: False to refuse classes at import paths (methods, tasks, levers) before anything is imported.

        Raises:
            ConfigError: with every problem in it, each with its line.
        """
        name = os.fspath(path)
        document = parse(_bytes(Path(path)), name)
        if not isinstance(document.value, Mapping):
            what = "is empty" if document.value is None else "holds a list" if isinstance(document.value, list) else "is not a map"
            raise ConfigError(f"{name}:1:1: the recipe {what}; it must be a map", "start with 'base:', 'method:', 'data:', 'output:'")

        def where(place: tuple[str | int, ...]) -> str:
            line = next((document.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in document.lines), 1)
            return f"{name}:{line}"

        return _read(cls, cast("Mapping[str, Any]", document.value), where, name, overrides, allow_import)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a dict, in which methods, sections and paths may be objects.

        Raises:
            ConfigError: with every problem in it.
        """
        given: Any = values
        if not isinstance(given, Mapping):
            raise ConfigError(f"a recipe must be a map, not {type(given).__name__}")
        return _read(cls, values, lambda place: "", "the recipe", overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return all keys and values, defaults included, as dicts, lists and scalars; inverse of :meth:`from_dict`."""

        def written(part: Any) -> dict[str, Any]:
            return {f.name: plain(getattr(part, f.name)) for f in fields(part)}

        starts = [{"start": start} if start is not None else {} for start in self.start]
        methods = [{"name": method_name(type(m))} | start | written(m) for m, start in zip(self.method, starts, strict=True)]
        sections = {name: written(getattr(self, name)) for name in SECTIONS}
        parts = {"base": sections.pop("base"), "method": methods[0] if len(methods) == 1 else methods}
        return parts | sections | {"output": self.output}

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML 1.2; :meth:`load` reads it back as an equal recipe."""
        return dump(self.to_dict())


def contradictions(data: Data, train: Train) -> list[str]:
    """Name every combination of valid values of the two sections that cannot work."""
    return [
        f"train.{name} is {value} without data.eval or data.eval_fraction: there are no evaluation rows"
        for name, value in (("patience", train.patience), ("eval_every", train.eval_every))
        if value is not None and not data.evaluates
    ]


def _output_problem(output: object) -> list[str]:
    text = str(output) if isinstance(output, (str, os.PathLike)) else ""  # pyright: ignore[reportUnknownArgumentType]
    if not text.strip():
        return [f"output is {shown(output)}; it must be the name of a directory"]
    return [f"output {shown(text)} {why}"] if (why := path_problem(text)) else []


def _bytes(path: Path) -> bytes:
    """The bytes of the file, up to one more than allowed."""
    if why := path_problem(str(path)):
        raise ConfigError(f"recipe {shown(str(path))} {why}")
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"did you mean {str(inside)!r}?" if inside.is_file() else "name the YAML file"
        raise ConfigError(f"recipe {str(path)!r} is a directory", hint)
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        there = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []
        raise ConfigError(f"recipe {str(path)!r} does not exist", nearest(path.name, there)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}") from None


def _read(
    cls: type[Recipe],
    values: Mapping[str, Any],
    where: Callable[[tuple[str | int, ...]], str],
    name: str,
    overrides: Sequence[str],
    allow_import: bool = True,
) -> Recipe:
    reading = Reading(allow_import)
    reading.add((), values, where)
    for layer, override in enumerate(overrides, start=1):
        _override(reading, override, layer)
    found, classes = reading.assign()
    several = max(classes, default=0) > 0
    built = [reading.method(i, kind, found, several) for i, kind in sorted(classes.items())]
    sections: dict[str, Any] = {section: reading.section(section, found) for section in SECTIONS}
    for key in (("data", 0, "task"), ("engine", 0, "levers")):
        named: Any = found[key].value if key in found else ()
        for entry in named if isinstance(named, (list, tuple)) else (named,):
            reading.refused(found[key], entry)
    output = found.get(("output", 0, "output"))
    if output is None:
        reading.problem("", "output is missing", "name a directory for the run, for instance 'output: runs/first'")
    else:
        for why in _output_problem(output.value):
            reading.problem(output.given.where, why)
    if isinstance(sections["data"], Data) and isinstance(sections["train"], Train):
        for why in contradictions(sections["data"], sections["train"]):
            given = found[("train", 0, why.split()[0].removeprefix("train."))].given
            reading.problem(given.where, why)
    problems = sorted(dict.fromkeys(reading.problems), key=lambda problem: problem[0])  # by line
    if problems:
        raise ConfigError(*together([(text, hint) for _, text, hint in problems], name))
    methods = tuple(m for m in built if m is not None)
    start = tuple(reading.starts.get(i) for i in sorted(classes))
    return cls(method=methods, start=start, output=output.value if output else "", notes=tuple(reading.notes), **sections)


def _override(reading: Reading, override: str, layer: int) -> None:
    key, equals, value = override.partition("=")
    words = key.strip().split(".")
    if not equals or not all(words):
        reading.problem("", f"override {override!r} is not of the form key=value", "for instance train.epochs=1")
        return
    where = f"override {override!r}"
    try:
        parsed = parse_value(value, where)
    except ConfigError as error:
        reading.problem("", error.message, error.hint)
        return
    path = tuple(int(w) if i == 1 and words[0] == "method" and w.isdecimal() else w for i, w in enumerate(words))
    reading.add(path, parsed, lambda _: where, layer)
