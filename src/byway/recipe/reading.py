"""From what was typed to sections: places, aliases, overrides, and every problem at once.

Everything typed becomes a :class:`Given` (where it stands, what it says). Aliases turn it into an :class:`Assigned` value of one of our
keys. Within one source two for the same key are an error; an override wins over the file. Then each value is checked against its field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from byway import methods
from byway.core.fields import checked, hints, required, shown
from byway.errors import BywayError, ConfigError, listed, nearest
from byway.recipe.aliases import ALIASES, BLOCKS, Alias, find, meant
from byway.recipe.sections import Base, Data, Engine, Section, Train

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["SECTIONS", "Given", "Reading"]

SECTIONS: Mapping[str, type[Section]] = {"base": Base, "data": Data, "train": Train, "engine": Engine}
TOP = ("base", "method", "data", "train", "engine", "output")

Path = tuple[str | int, ...]
Key = tuple[str, int, str]
"""Section, index (of the method; else 0), field."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """One value as it was typed."""

    path: Path
    value: Any
    where: str
    """``recipe.yaml:12``, ``override train.epochs=0``, or nothing."""
    layer: int = 0
    """0: the recipe; from 1: overrides, of which the later wins."""

    @property
    def typed(self) -> str:
        """The key as the user wrote it."""
        return ".".join(str(part) for part in self.path)


@dataclass(frozen=True)
class Assigned:
    """What a given value sets."""

    key: Key
    value: Any
    given: Given
    alias: Alias | None = None


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it."""

    text: str
    hint: str = ""
    line: int = 0


class Reading:
    """Collects what was typed, then answers with the fields of each section; problems and notes gather on the way."""

    def __init__(self) -> None:
        self.givens: list[Given] = []
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.instances: dict[int, Method] = {}
        """Methods given as objects, from Python."""
        self.broken: set[str] = set()
        """Sections that are no mapping: nothing in them can be missing."""

    # ------------------------------------------------ what was typed

    def add(self, path: Path, value: Any, where: Callable[[Path], str], layer: int = 0) -> None:
        """Take in `value`, typed at `path`; ``()`` is the whole recipe. In a later layer it takes the place of what stood there."""
        if layer and (path == ("method",) or _is_item(path) or (len(path) == 1 and path[0] in TOP)):
            self.givens = [g for g in self.givens if g.path[: len(path)] != path and not (path == ("method", 0) and _first_method(g.path))]
        self.givens += self._leaves(path, value, where, 0 if path == ("method",) else layer)

    def _leaves(self, path: Path, value: Any, where: Callable[[Path], str], layer: int) -> Iterator[Given]:
        inner = not path or _is_item(path) or (len(path) == 1 and (path[0] in SECTIONS or path[0] == "method"))
        if path == ("method",) and isinstance(value, (list, tuple)):
            items = cast("Sequence[Any]", value)
            if not items:
                self.problem(where(path), "method is an empty list; it must hold at least one method", "method: {name: lora}")
            for i, item in enumerate(items):
                yield from self._leaves((*path, i), item, where, layer)
        elif (path == ("method",) or _is_item(path)) and _is_method(value):
            yield Given(path=path, value=value, where=where(path), layer=layer)
        elif isinstance(value, Mapping) and (inner or _is_block(path)):
            for key, item in cast("Mapping[Any, Any]", value).items():
                yield from self._leaves((*path, str(key)), item, where, layer)
        elif isinstance(value, Section) and inner:
            yield from self._leaves(path, {f.name: getattr(value, f.name) for f in fields(value)}, where, layer)
        elif not inner:
            yield Given(path=path, value=value, where=where(path), layer=layer)
        elif value is not None or not path:
            name = ".".join(str(part) for part in path)
            hint = "method: {name: lora}" if path and path[0] == "method" else ""
            self.broken.add(str(path[0]) if path else "")
            kind = "a mapping or a list of mappings" if path == ("method",) else "a mapping"
            self.problem(where(path), f"{name} is {shown(value)}; it must be {kind}", hint)

    def problem(self, where: str, text: str, hint: str = "") -> None:
        """Remember what is wrong at `where`."""
        line = re.search(r":(\d+)$", where)
        self.problems.append(Problem(f"{where}: {text}" if where else text, hint, int(line[1]) if line else 0))

    def raise_problems(self, name: str) -> None:
        """One ConfigError for everything found, in the order of the lines; nothing if there was nothing."""
        found = sorted(dict.fromkeys(self.problems), key=lambda problem: problem.line)
        if len(found) == 1:
            raise ConfigError(found[0].text, found[0].hint)
        if found:
            lines = [f"  {p.text} ({p.hint})" if p.hint else f"  {p.text}" for p in found]
            raise ConfigError("\n".join([f"{len(found)} problems in {name}:", *lines]))

    # ------------------------------------------------ names and aliases

    def settle(self) -> tuple[dict[Key, Assigned], dict[int, type[Method]]]:
        """Our keys → what is set, and the class of each method."""
        count = 1 + max((_index(g.path) or 0 for g in self.givens if g.layer == 0), default=0)
        for given in self.givens:
            if (_index(given.path) or 0) >= count:
                self.problem(given.where, f"{given.typed}: the recipe has {count} method{'s' * (count > 1)}, counted from 0")
        givens = [g for g in self.givens if (_index(g.path) or 0) < count]
        self.instances = {_index(g.path) or 0: g.value for g in givens if _is_instance(g)}
        givens = [g for g in givens if not _is_instance(g)]
        classes = {i: type(m) for i, m in self.instances.items()} | self._classes(self._method_names(givens, count))
        found = self._unique([a for g in givens for a in self._assignments(g, count, classes)])
        self._multiply(found)
        for i in range(count):
            if i not in classes and ("method", i, "name") not in found and "method" not in self.broken:
                where = f"method.{i}" if count > 1 else "method"
                self.problem("", f"{where}.name is missing", f"there are: {listed(methods.names())}")
        return found, classes

    def _method_names(self, givens: Sequence[Given], count: int) -> dict[int, Assigned]:
        """Who says which method it is: ``name``, an alias of it, or an alias that only one method has (``lora_r``)."""
        first_look = sorted((a for g in givens for a in self._assignments(g, count, {}, quiet=True)), key=lambda a: a.given.layer)
        names = {a.key[1]: a for a in first_look if a.key[0] == "method" and a.key[2] == "name"}
        for a in first_look:
            if a.key[0] == "method" and a.alias is not None and a.alias.implies and a.key[1] not in {*names, *self.instances}:
                names[a.key[1]] = Assigned(("method", a.key[1], "name"), a.alias.implies, a.given)
                self.notes.append(f"{a.given.typed} implies method.name: {a.alias.implies}")
        return names

    def _classes(self, names: Mapping[int, Assigned]) -> dict[int, type[Method]]:
        classes: dict[int, type[Method]] = {}
        for i, assigned in names.items():
            if not isinstance(assigned.value, str):
                why = f"{assigned.given.typed} is {shown(assigned.value)}; it must be the name of a method"
                self.problem(assigned.given.where, why, f"there are: {listed(methods.names())}")
                continue
            try:
                classes[i] = methods.load(assigned.value)
            except ConfigError as error:
                self.problem(assigned.given.where, f"{assigned.given.typed}: {error.message}", error.hint)
        return classes

    def _assignments(self, given: Given, count: int, classes: Mapping[int, type[Method]], *, quiet: bool = False) -> list[Assigned]:
        """What `given` sets. `quiet`: say nothing of what is not understood (a first look, for the methods' names)."""
        section, index, name, block = _place(given.path)
        if section == "output":
            return [Assigned(("output", 0, "output"), given.value, given)]
        if section == "method" and index is None and count > 1:
            if not quiet:
                self.problem(given.where, f"{given.typed}: the recipe has {count} methods", f"say which: method.0.{name} ...")
            return []
        index = index or 0
        own = {*hints(classes[index]), "name"} if section == "method" and index in classes else {"name"} if section == "method" else None
        known: set[str] = own if own is not None else set(hints(SECTIONS[section])) if section else set()
        if section and name in known:
            return [Assigned((section, index, name), given.value, given)]
        alias = find(name, section, block=block)
        sets = meant(alias, given.value) if alias is not None else None
        if quiet and sets is None:
            return []
        if alias is None:
            if not (section == "method" and index not in classes):  # without a class nothing is known about its keys
                self._unknown(given, section, name, known, classes)
            return []
        if sets is None:
            allowed = [shown(value) for value in alias.values or ()]
            self.problem(given.where, f"{given.typed} is {shown(given.value)}; it must be {' or '.join(allowed)}")
            return []
        return self._targets(given, alias, sets, index, count, classes, quiet)

    def _targets(
        self, given: Given, alias: Alias, sets: Mapping[str, Any], index: int, count: int, classes: Mapping[int, type[Method]], quiet: bool
    ) -> list[Assigned]:
        """The keys that an alias sets, if they exist."""
        found: list[Assigned] = []
        for ours, value in sets.items():
            section, _, name = ours.partition(".")
            if section == "method" and index in classes and name not in {*hints(classes[index]), "name"}:
                has = listed(hints(classes[index]))
                self.problem(given.where, f"{given.typed} is {name}, which {classes[index].__name__} does not have", f"it has: {has}")
                continue
            if section == "method" and _index(given.path) is None and count > 1 and not quiet:
                self.problem(given.where, f"{given.typed}: the recipe has {count} methods", f"say which: method.0.{name} ...")
                continue
            if not quiet and not alias.factor:
                self.notes.append(f"{given.typed}: {shown(given.value)} is read as {ours}: {shown(value)}")
            found.append(Assigned((section, index, name or section), value, given, alias))
        return found

    def _unknown(self, given: Given, section: str | None, name: str, known: set[str], classes: Mapping[int, type[Method]]) -> None:
        """Say that `given`'s key does not exist, and which one may have been meant."""
        first, _, rest = name.partition(".")
        keys = {(s, n) for s, cls in SECTIONS.items() for n in hints(cls)} | {("method", n) for cls in classes.values() for n in hints(cls)}
        # another program's name for a key that this method does not have would be refused as well
        here = {f"{s}.{n}" for s, n in keys} | {"method.name"}
        usable = [a for a in ALIASES if not a.block_only and (a.key in here or not a.key.startswith("method."))]
        aliases = [(a.key.split(".")[0], n) for a in usable for n in a.names.split()]
        homes = sorted(s for s, n in {*keys, *aliases} if n == name and s != section)
        if rest and first in known:
            hint = f"give the whole value: {section}.{first}={{...}}"
        elif homes:
            hint = f"it belongs to {homes[0]}" if section else f"write it under {homes[0]}"
        elif section:
            hint = nearest(name, [*sorted(known), *(n for s, n in aliases if s == section)])
            hint = hint or nearest(name, [n for _, n in (*sorted(keys), *aliases)]) or f"{section} has: {listed(known, 40)}"
        else:
            hint = nearest(first, [*TOP, *(n for _, n in (*aliases, *sorted(keys)))]) or f"a recipe has: {', '.join(TOP)}"
        self.problem(given.where, f"unknown key {given.typed!r}", hint)

    def _unique(self, assigned: Sequence[Assigned]) -> dict[Key, Assigned]:
        """One value a key: an override wins; two in one source are an error, unless two switches say the same."""
        found: dict[Key, Assigned] = {}
        for one in sorted(assigned, key=lambda a: a.given.layer):
            key = (*one.key[:2], f"{one.key[2]}*{one.alias.names}") if one.alias is not None and one.alias.factor else one.key
            other = found.get(key)
            if other is not None and other.given.layer == one.given.layer:
                same = all(a.alias is not None and a.alias.values is not None for a in (one, other)) and one.value == other.value
                if not same:
                    self._twice(other, one)
            found[key] = one
        return found

    def _twice(self, first: Assigned, second: Assigned) -> None:
        ours = _named(second.key)
        there = f" ({first.given.where})" if first.given.where else ""
        why = f"{second.given.typed} and {first.given.typed}{there} both set {ours}" if ours else ""
        self.problem(second.given.where, why, "keep one of the two")

    def _multiply(self, found: dict[Key, Assigned]) -> None:
        """Factors of one key (rows per device × accumulation) become their product."""
        parts = {key: one for key, one in found.items() if "*" in key[2]}
        for key in parts:
            del found[key]
        for target in dict.fromkeys(one.key for one in parts.values()):
            factors = [one for one in parts.values() if one.key == target]
            whole = found.get(target)
            layer = max(one.given.layer for one in factors)
            if whole is not None and whole.given.layer > layer:
                continue
            if whole is not None and whole.given.layer == layer:
                self._twice(whole, factors[0])
            bad = [one for one in factors if type(one.value) is not int or one.value < 1]
            for one in bad:
                self.problem(one.given.where, f"{one.given.typed} is {shown(one.value)}; it must be a whole number of at least 1")
            alone = next((one.alias for one in factors if one.alias is not None and one.alias.needs), None)
            if alone is not None and len(factors) == 1:
                self.problem(
                    factors[0].given.where, f"{factors[0].given.typed} stands alone", f"add {alone.needs}, or set {_named(target)}"
                )
            if not bad:
                product = math.prod(one.value for one in factors)
                found[target] = replace(factors[-1], value=product)
                self.notes.append(f"{' x '.join(one.given.typed for one in factors)} is read as {_named(target)}: {product}")

    # ------------------------------------------------ values

    def section(self, name: str, found: Mapping[Key, Assigned]) -> Section | None:
        """The section of that name, or None if something in it is wrong."""
        return self._built(SECTIONS[name], name, {k[2]: a for k, a in found.items() if k[0] == name})

    def method(self, index: int, cls: type[Method], found: Mapping[Key, Assigned], several: bool) -> Method | None:
        """The method at `index`, or None if something in it is wrong."""
        given = {k[2]: a for k, a in found.items() if k[:2] == ("method", index) and k[2] != "name"}
        instance = self.instances.get(index)
        if instance is not None and not given:
            return instance
        if instance is not None:
            own = {f.name: getattr(instance, f.name) for f in fields(instance)}
            nowhere = Given(path=("method", index), value=None, where="")
            given = {name: Assigned(("method", index, name), value, nowhere) for name, value in own.items()} | given
        return self._built(cls, f"method.{index}" if several else "method", given)

    def _built(self, cls: type[Any], name: str, given: Mapping[str, Assigned]) -> Any:
        """An instance of the dataclass `cls`; every value is checked by its field, then what is right is checked together."""
        values: dict[str, Any] = {}
        before = len(self.problems)
        for f in fields(cls):
            one = given.get(f.name)
            if one is None:
                if required(f) and name not in self.broken:
                    self.problem("", f"{name}.{f.name} is missing")
                continue
            value, wrong = checked(cls, f.name, one.value)
            if wrong:
                typed = f"{name}.{f.name}" if one.alias is None else f"{one.given.typed} ({name}.{f.name})"
                self.problem(one.given.where, f"{typed} {wrong}")
            else:
                values[f.name] = value
        if any(required(f) and f.name not in values for f in fields(cls)):
            return None
        try:
            made = cls(**values)
        except (BywayError, ValueError, TypeError) as error:
            self._refused(error, name, {key: given[key] for key in values})
            return None
        return made if len(self.problems) == before else None

    def _refused(self, error: Exception, name: str, given: Mapping[str, Assigned]) -> None:
        """What a class said against its values, with the place of the first field that it names."""
        message, hint = (error.message, error.hint) if isinstance(error, BywayError) else (str(error), "")
        message = message.removeprefix(f"{name}.")
        named = [word for word in re.findall(r"\w+", message) if word in given]
        starts = bool(named) and message.startswith(named[0])
        self.problem(given[named[0]].given.where if named else "", f"{name}.{message}" if starts else f"{name}: {message}", hint)


def _place(path: Path) -> tuple[str | None, int | None, str, bool]:
    """(section or None at the top level, the method's index if it was said, key, whether it stands in a MindFormers block)."""
    words = tuple(part for part in path if isinstance(part, str))
    name = words[-1]
    if words[:-1] in BLOCKS:
        return BLOCKS[words[:-1]], _index(path), name, True
    if len(path) > 1 and path[0] in (*SECTIONS, "method"):
        return str(path[0]), _index(path), ".".join(words[1:]), False
    return ("output" if path == ("output",) else None), None, ".".join(words), False


def _index(path: Path) -> int | None:
    return path[1] if len(path) > 1 and path[0] == "method" and isinstance(path[1], int) else None


def _is_item(path: Path) -> bool:
    """Whether `path` is a whole entry of a list of methods."""
    return len(path) == 2 and path[0] == "method" and isinstance(path[1], int)


def _first_method(path: Path) -> bool:
    return path[0] == "method" and (len(path) == 1 or isinstance(path[1], str))


def _is_block(path: Path) -> bool:
    """Whether a MindFormers block is at `path` or below it."""
    words = tuple(part for part in path if isinstance(part, str))
    return any(place[: len(words)] == words for place in BLOCKS)


def _is_method(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, (type, Section))


def _is_instance(given: Given) -> bool:
    return given.path[0] == "method" and _is_method(given.value)


def _named(key: Key) -> str:
    return "output" if key[0] == "output" else f"{key[0]}.{key[2]}"
