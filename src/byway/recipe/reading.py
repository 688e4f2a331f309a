"""Turn what was typed into sections and methods, and report every problem at once.

Each value that was typed becomes a :class:`Given`: its place, and what it says. Aliases turn it into :class:`Assigned`
values of Byway's own keys. Two values for one key in one source are an error; an override wins over the file. Then each
value is checked against its field.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from byway import methods
from byway.core.fields import Count, checked, hints, required, shown, wrong
from byway.errors import BywayError, ConfigError, listed, nearest
from byway.recipe.aliases import ALIASES, BLOCKS, Alias, Ignored, find, ignored, meant
from byway.recipe.names import method_name
from byway.recipe.sections import Base, Data, Engine, Section, Train

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["SECTIONS", "Given", "Reading"]

SECTIONS: Mapping[str, type[Section]] = {"base": Base, "data": Data, "train": Train, "engine": Engine}
TOP = ("base", "method", "data", "train", "engine", "output")

Path = tuple[str | int, ...]
Key = tuple[str, int, str]
"""Section, index (of the method; 0 for other sections), field."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """One value as it was typed."""

    path: Path
    value: Any
    where: str
    """``recipe.yaml:12``, ``override train.epochs=0``, or an empty string."""
    layer: int = 0
    """0: the recipe; from 1: overrides, of which the later wins."""

    @property
    def typed(self) -> str:
        """The key as the user wrote it."""
        return ".".join(str(part) for part in self.path)

    @property
    def index(self) -> int | None:
        """The index of the method that it names, if it names one."""
        return self.path[1] if len(self.path) > 1 and self.path[0] == "method" and isinstance(self.path[1], int) else None

    @property
    def is_method(self) -> bool:
        """True if it is a method as an object, from Python."""
        return self.path[0] == "method" and _is_method(self.value)

    @property
    def place(self) -> tuple[str | None, str, bool]:
        """(section, or None at the top level; key; True if it stands in a MindFormers block)."""
        words = tuple(part for part in self.path if isinstance(part, str))
        if words[:-1] in BLOCKS:
            return BLOCKS[words[:-1]], words[-1], True
        if len(self.path) > 1 and self.path[0] in (*SECTIONS, "method"):
            return str(self.path[0]), ".".join(words[1:]), False
        return ("output" if self.path == ("output",) else None), ".".join(words), False


@dataclass(frozen=True)
class Assigned:
    """One of Byway's keys, and the value that it is given."""

    key: Key
    value: Any
    given: Given
    alias: Alias | None = None

    @property
    def name(self) -> str:
        """The key as users know it."""
        return "output" if self.key[0] == "output" else f"{self.key[0]}.{self.key[2]}"


class Reading:
    """Collects what was typed, then returns the values of each section; gathers problems and notes on the way."""

    def __init__(self, allow_import: bool = True) -> None:
        self.allow_import = allow_import
        """False for a recipe that somebody else may have written: a class at an import path is then a problem."""
        self.givens: list[Given] = []
        self.problems: list[tuple[int, str, str]] = []
        """(line or 0, text, hint)."""
        self.notes: list[str] = []
        self.instances: dict[int, Method] = {}
        """Methods given as objects, from Python."""
        self.starts: dict[int, str] = {}
        """``method.start``: directories of the adapters that methods start from."""
        self.described: dict[int, Method] = {}
        """The methods of those adapters."""
        self.broken: set[str] = set()
        """Sections that are not mappings: none of their keys is reported as missing."""

    # ------------------------------------------------ what was typed

    def add(self, path: Path, value: Any, where: Callable[[Path], str], layer: int = 0) -> None:
        """Take in `value`, typed at `path` (``()``: all of it). A section in a later layer replaces the earlier one."""
        if layer and (_is_item(path) or (len(path) == 1 and path[0] in TOP)):
            alone = path == ("method", 0)  # also written as `method: {...}`
            self.givens = [
                g for g in self.givens if g.path[: len(path)] != path and not (alone and g.path[0] == "method" and g.index is None)
            ]
        self.givens += self._leaves(path, value, where, 0 if path == ("method",) else layer)

    def _leaves(self, path: Path, value: Any, where: Callable[[Path], str], layer: int) -> Iterator[Given]:
        is_method = path == ("method",) or _is_item(path)
        inner = not path or is_method or (len(path) == 1 and path[0] in SECTIONS)
        words = tuple(part for part in path if isinstance(part, str))
        if path == ("method",) and isinstance(value, (list, tuple)):
            items = cast("Sequence[Any]", value)
            if not items:
                self.problem(where(path), "method is an empty list; it must contain at least one method", "method: {name: lora}")
            for i, item in enumerate(items):
                yield from self._leaves((*path, i), item, where, layer)
        elif is_method and _is_method(value):
            yield Given(path=path, value=value, where=where(path), layer=layer)
        elif isinstance(value, Mapping) and (inner or any(block[: len(words)] == words for block in BLOCKS)):
            for key, item in cast("Mapping[Any, Any]", value).items():
                yield from self._leaves((*path, str(key)), item, where, layer)
        elif isinstance(value, Section) and inner:
            yield from self._leaves(path, {f.name: getattr(value, f.name) for f in fields(value)}, where, layer)
        elif not inner:
            yield Given(path=path, value=value, where=where(path), layer=layer)
        elif value is not None or not path:
            name = ".".join(str(part) for part in path)
            self.broken.add(str(path[0]) if path else "")
            kind = "a map or a list of maps" if path == ("method",) else "a map"
            self.problem(where(path), f"{name} is {shown(value)}; it must be {kind}", "method: {name: lora}" if is_method else "")

    def problem(self, where: str, text: str, hint: str = "") -> None:
        """Record what is wrong at `where`."""
        line = re.search(r":(\d+)$", where)
        self.problems.append((int(line[1]) if line else 0, f"{where}: {text}" if where else text, hint))

    def refused(self, assigned: Assigned, name: Any) -> bool:
        """True if `name` is an import path and nothing may be imported, which is recorded as a problem."""
        if self.allow_import or not isinstance(name, str) or ":" not in name:
            return False
        what = f"{assigned.given.typed} names {name!r}: using it would run code that this recipe's author chose"
        self.problem(assigned.given.where, what, "--allow-import (allow_import=True) permits it; use it if you trust the author")
        return True

    # ------------------------------------------------ names and aliases

    def assign(self) -> tuple[dict[Key, Assigned], dict[int, type[Method]]]:
        """Return Byway's keys with what is assigned to them, and the class of each method."""
        count = 1 + max((g.index or 0 for g in self.givens if g.layer == 0), default=0)
        for given in self.givens:
            if (given.index or 0) >= count:
                self.problem(given.where, f"{given.typed}: the recipe has {count} method{'s' * (count > 1)}, counted from 0")
        known = [g for g in self.givens if (g.index or 0) < count]
        self.instances = {g.index or 0: g.value for g in known if g.is_method}
        givens = [g for g in known if not g.is_method]
        classes = {i: type(m) for i, m in self.instances.items()} | self._classes(givens, count)
        self._describe(givens, count, classes)
        found = self._unique([a for g in givens for a in self._assignments(g, count, classes)])
        self._multiply(found)
        for i in range(count):
            if i not in classes and i not in self.starts and ("method", i, "name") not in found and "method" not in self.broken:
                where = f"method.{i}" if count > 1 else "method"
                self.problem("", f"{where}.name is missing", f"there are: {listed(methods.names())}")
        return found, classes

    def _classes(self, givens: Sequence[Given], count: int) -> dict[int, type[Method]]:
        """The methods' classes, named by ``name``, its aliases, or an alias that only one method has (``lora_r``)."""
        first_look = sorted((a for g in givens for a in self._assignments(g, count, {}, quiet=True)), key=lambda a: a.given.layer)
        names = {a.key[1]: a for a in first_look if a.key[0] == "method" and a.key[2] == "name"}
        for a in first_look:
            if a.key[0] == "method" and a.alias is not None and a.alias.implies and a.key[1] not in {*names, *self.instances}:
                names[a.key[1]] = Assigned(("method", a.key[1], "name"), a.alias.implies, a.given)
                self.notes.append(f"{a.given.typed} implies method.name: {a.alias.implies}")
        classes: dict[int, type[Method]] = {}
        for i, a in names.items():
            if not isinstance(a.value, str):
                why = f"{a.given.typed} is {shown(a.value)}; it must be the name of a method"
                self.problem(a.given.where, why, f"there are: {listed(methods.names())}")
                continue
            if self.refused(a, a.value):
                continue
            try:
                classes[i] = methods.load(a.value)
            except ConfigError as error:
                self.problem(a.given.where, f"{a.given.typed}: {error.message}", error.hint)
        return classes

    def _describe(self, givens: Sequence[Given], count: int, classes: dict[int, type[Method]]) -> None:
        """Read the configurations of the adapters that methods start from; they name the class if nothing else does."""
        first_look = sorted((a for g in givens for a in self._assignments(g, count, {}, quiet=True)), key=lambda a: a.given.layer)
        for i, a in {a.key[1]: a for a in first_look if a.key[0] == "method" and a.key[2] == "start" and a.value is not None}.items():
            if not isinstance(a.value, str):
                self.problem(a.given.where, f"{a.given.typed} is {shown(a.value)}; it must be the directory of an adapter")
                continue
            self.starts[i] = a.value
            if i in classes and not os.path.isdir(a.value):
                continue  # the recipe of a run that has finished: training reports it
            from byway.formats.load import describe

            try:
                self.described[i] = described = describe(a.value, [classes[i]] if i in classes else ())
            except BywayError as error:
                self.problem(a.given.where, f"{a.given.typed}: {error.message}", error.hint)
                continue
            if not issubclass(type(described), classes.setdefault(i, type(described))):
                has = method_name(type(described))
                self.problem(
                    a.given.where, f"{a.given.typed}: the adapter in {a.value} is a {has}", f"leave method.name out, or name {has}"
                )

    def _assignments(self, given: Given, count: int, classes: Mapping[int, type[Method]], *, quiet: bool = False) -> list[Assigned]:
        """The keys that `given` sets. `quiet`: report nothing (a first look, for the names of the methods)."""
        section, name, block = given.place
        if section == "output":
            return [Assigned(("output", 0, "output"), given.value, given)]
        unsaid = given.index is None and count > 1
        if section == "method" and unsaid:
            if not quiet:
                self.problem(given.where, f"{given.typed}: the recipe has {count} methods", f"say which: method.0.{name} ...")
            return []
        index = given.index or 0
        own = {*hints(classes[index]), "name", "start"} if index in classes else {"name", "start"}
        known: set[str] = own if section == "method" else set(hints(SECTIONS[section])) if section else set()
        if section and name in known:
            return [Assigned((section, index, name), given.value, given)]
        alias = find(name, section, block=block)
        sets = meant(alias, given.value) if alias is not None else None
        if quiet and sets is None:
            return []
        if alias is None and (entry := ignored(name)) is not None:
            if not quiet:
                self._ignore(given, entry)
            return []
        if alias is None:
            if not (section == "method" and index not in classes):  # without a class, its keys are not known
                self._unknown(given, section, name, known, classes)
            return []
        if sets is None:
            allowed = [shown(value) for value in alias.values or ()]
            self.problem(given.where, f"{given.typed} is {shown(given.value)}; it must be {' or '.join(allowed)}")
            return []
        found: list[Assigned] = []
        for ours, value in sets.items():
            into, _, field = ours.partition(".")
            if into == "method" and index in classes and field not in own:
                has = listed(hints(classes[index]))
                self.problem(given.where, f"{given.typed} is {field}, which {classes[index].__name__} does not have", f"it has: {has}")
            elif into == "method" and unsaid and not quiet:
                self.problem(given.where, f"{given.typed}: the recipe has {count} methods", f"say which: method.0.{field} ...")
            else:
                if not quiet and not alias.factor:
                    self.notes.append(f"{given.typed}: {shown(given.value)} is read as {ours}: {shown(value)}")
                found.append(Assigned((into, index, field or into), value, given, alias))
        return found

    def _ignore(self, given: Given, entry: Ignored) -> None:
        """Note a key that has no effect; a value that would change what is trained is a problem."""
        if entry.values and given.value is not None and str(given.value).lower() not in entry.values:
            self.problem(given.where, f"{given.typed}: {shown(given.value)} is not supported: {entry.why}", f"leave {given.typed} out")
        else:
            self.notes.append(f"{given.typed}: {shown(given.value)} has no effect: {entry.why}")

    def _unknown(self, given: Given, section: str | None, name: str, known: set[str], classes: Mapping[int, type[Method]]) -> None:
        """Report that the key of `given` does not exist, with the key that may have been meant."""
        first, _, rest = name.partition(".")
        keys = {(s, n) for s, cls in SECTIONS.items() for n in hints(cls)} | {("method", n) for cls in classes.values() for n in hints(cls)}
        # do not suggest another program's name for a key that this method does not have: it would be refused as well
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
            # a key of another section is named with it
            elsewhere = {n: f"{s}.{n}" for s, n in (*aliases, *sorted(keys)) if s != section}
            close = difflib.get_close_matches(name, elsewhere, n=1)
            hint = hint or (f"did you mean {elsewhere[close[0]]!r}?" if close else f"{section} has: {listed(known, 40)}")
        else:
            hint = nearest(first, [*TOP, *(n for _, n in (*aliases, *sorted(keys)))]) or f"a recipe has: {', '.join(TOP)}"
        self.problem(given.where, f"unknown key {given.typed!r}", hint)

    def _unique(self, assigned: Sequence[Assigned]) -> dict[Key, Assigned]:
        """One value for each key: an override wins; two in one source are an error, unless two switches agree."""
        found: dict[Key, Assigned] = {}
        for one in sorted(assigned, key=lambda a: a.given.layer):
            key = (*one.key[:2], f"{one.key[2]}*{one.alias.names}") if one.alias is not None and one.alias.factor else one.key
            other = found.get(key)
            if other is not None and other.given.layer == one.given.layer:
                switches = all(a.alias is not None and a.alias.values is not None for a in (one, other))
                if not (switches and one.value == other.value):
                    self._twice(other, one)
            found[key] = one
        return found

    def _twice(self, first: Assigned, second: Assigned) -> None:
        there = f" ({first.given.where})" if first.given.where else ""
        why = f"{second.given.typed} and {first.given.typed}{there} both set {second.name}"
        self.problem(second.given.where, why, "keep one of the two")

    def _multiply(self, found: dict[Key, Assigned]) -> None:
        """Replace the factors of one key (rows per device × accumulation) by their product."""
        parts = [found.pop(key) for key in list(found) if "*" in key[2]]
        for target in dict.fromkeys(one.key for one in parts):
            factors = [one for one in parts if one.key == target]
            whole = found.get(target)
            layer = max(one.given.layer for one in factors)
            if whole is not None and whole.given.layer > layer:
                continue
            if whole is not None and whole.given.layer == layer:
                self._twice(whole, factors[0])
            bad = [(one, why) for one in factors for why, _ in wrong(Count, one.value)]
            for one, why in bad:
                self.problem(one.given.where, one.given.typed + why)
            first = factors[0]
            alone = next((one.alias for one in factors if one.alias is not None and one.alias.needs), None)
            if alone is not None and len(factors) == 1:
                self.problem(first.given.where, f"{first.given.typed} stands alone", f"add {alone.needs}, or set {first.name}")
            if not bad:
                product = math.prod(one.value for one in factors)
                found[target] = replace(factors[-1], value=product)
                self.notes.append(f"{' x '.join(one.given.typed for one in factors)} is read as {first.name}: {product}")

    # ------------------------------------------------ values

    def section(self, name: str, found: Mapping[Key, Assigned]) -> Section | None:
        """Build the section of that name; None if something in it is wrong."""
        return self._built(SECTIONS[name], name, {k[2]: a for k, a in found.items() if k[0] == name})

    def method(self, index: int, cls: type[Method], found: Mapping[Key, Assigned], several: bool) -> Method | None:
        """Build the method at `index`; None if something in it is wrong."""
        given = {k[2]: a for k, a in found.items() if k[:2] == ("method", index) and k[2] not in ("name", "start")}
        instance = self.instances.get(index, self.described.get(index))
        if instance is not None and not given:
            return instance
        if instance is not None:
            nowhere = Given(path=("method", index), value=None, where="")
            own = {f.name: Assigned(("method", index, f.name), getattr(instance, f.name), nowhere) for f in fields(instance)}
            given = own | given
        return self._built(cls, f"method.{index}" if several else "method", given)

    def _built(self, cls: type[Any], name: str, given: Mapping[str, Assigned]) -> Any:
        """An instance of the dataclass `cls`: each value is checked by its field, then all of them together."""
        values: dict[str, Any] = {}
        before = len(self.problems)
        for f in fields(cls):
            one = given.get(f.name)
            if one is None:
                if required(f) and name not in self.broken:
                    self.problem("", f"{name}.{f.name} is missing")
                continue
            value, problems = checked(cls, f.name, one.value)
            if not problems:
                values[f.name] = value
            for why, hint in problems:
                typed = f"{name}.{f.name}" if one.alias is None else f"{one.given.typed} ({name}.{f.name})"
                self.problem(one.given.where, typed + why, hint)
        if any(required(f) and f.name not in values for f in fields(cls)):
            return None
        try:
            made = cls(**values)
        except (BywayError, ValueError, TypeError) as error:
            message, hint = (error.message, error.hint) if isinstance(error, BywayError) else (str(error), "")
            message = message.removeprefix(f"{name}.")
            named = [word for word in re.findall(r"\w+", message) if word in values]  # its place is that of the first field it names
            starts = bool(named) and message.startswith(named[0])
            where = given[named[0]].given.where if named else ""
            self.problem(where, f"{name}.{message}" if starts else f"{name}: {message}", hint)
            return None
        return made if len(self.problems) == before else None


def _is_item(path: Path) -> bool:
    """True if `path` is that of a whole entry in a list of methods."""
    return len(path) == 2 and path[0] == "method" and isinstance(path[1], int)


def _is_method(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, (type, Section))
