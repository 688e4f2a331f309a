"""The annotations of a dataclass's fields, read as a strict check, as words for an error, and as JSON schema.

Sections of a recipe and methods stay plain: ``rank: Annotated[int, Ge(1)] = 8`` with a string under it that
documents the field. The check does not convert scalars: ``"4"``, ``true`` and ``4.0`` are not integers. An integer is a
valid number; NaN and infinity are not. Lists become tuples. A type that pydantic does not know is not checked.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import os
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from dataclasses import Field as DataclassField
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from byway.core.disk.paths import half_character
from byway.core.registry import IMPORT_PATH, entries
from byway.errors import ConfigError, nearest, together

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "Count",
    "Dropout",
    "Entry",
    "Later",
    "Layers",
    "Names",
    "NonBlank",
    "NotNegative",
    "Positive",
    "Rank",
    "Text",
    "Token",
    "checked",
    "described",
    "field_docs",
    "from_json",
    "hints",
    "json_schema",
    "plain",
    "required",
    "shown",
    "summary_line",
    "valid",
    "wrong",
]

T = TypeVar("T")

# every number has an upper limit: slips are found before a model is loaded, and none makes a run hang or fill memory
Count = Annotated[int, Ge(1), Le(10**9)]
Rank = Annotated[int, Ge(1), Le(65_536)]
"""No weight to adapt is wider."""
Layer = Annotated[int, Le(9_999)]
Layers = str | Layer | Sequence[Layer | str]
"""Indices and ranges (``core/targets/layers.py``)."""
Token = Annotated[int, Le(10**9)]
Positive = Annotated[float, Gt(0), Le(10**6)]
NotNegative = Annotated[float, Ge(0), Le(10**6)]
Dropout = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, MinLen(1)]
Names = Text | Annotated[Sequence[Text], MinLen(1)]


@dataclass(frozen=True)
class Pattern:
    """In an annotation of a string: the regular expression that it must contain a match of."""

    pattern: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"pattern": self.pattern}


NonBlank = Annotated[str, Pattern(r"\S")]


class Later:
    """In an annotation: values that are planned and do not exist yet. They are refused with a message of their own."""

    def __init__(self, *values: str) -> None:
        self.values = values


@dataclass(frozen=True)
class Entry:
    """In an annotation of a string: the name of a file in one of Byway's packages, or the import path of another class.

    Names are listed without importing the package, so that a lower layer may refer to a higher one.
    """

    package: str
    """``byway.tasks``."""
    apart: tuple[str, ...] = ()
    """Files in the package that define no entry."""

    def names(self) -> tuple[str, ...]:
        """The names of the files, sorted."""
        spec = importlib.util.find_spec(self.package)
        return entries(spec.submodule_search_locations or () if spec else (), apart=self.apart)

    def check(self, value: str) -> str:
        """Return `value` if it is a name or an import path; raise ValueError otherwise."""
        if value not in self.names() and not re.fullmatch(IMPORT_PATH, value):
            raise ValueError(value)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(self.names())}, {"type": "string", "pattern": IMPORT_PATH}]}


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """Field → its annotation, including what stands in ``Annotated``.

    Raises:
        ConfigError: an annotation cannot be resolved at run time.
    """
    try:
        found = get_type_hints(cls, include_extras=True)
    except NameError as error:
        why = f"{cls.__qualname__}: a field's type cannot be resolved ({error})"
        raise ConfigError(why, "import it outside `if TYPE_CHECKING:`") from None
    return {f.name: found[f.name] for f in fields(cls)}


def valid(instance: Any, prefix: str = "") -> dict[str, Any]:
    """Return the checked values of a dataclass instance's fields.

    Raises:
        ConfigError: with every problem found; `prefix` is put before the names of fields.
    """
    values: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for f in fields(instance):
        values[f.name], found = checked(type(instance), f.name, getattr(instance, f.name))
        problems += [(f"{prefix}{f.name}{why}", hint) for why, hint in found]
    if problems:
        raise ConfigError(*together(problems))
    return values


def checked(cls: type, field: str, value: Any) -> tuple[Any, list[tuple[str, str]]]:
    """Check a value for one field of `cls`: return (the value as the field's type, problems).

    A problem is (text, hint); the text follows the field's name: ``" is 0; it must be ..."``, ``"['q'] is 0; ..."``.
    """
    return _checked(_adapter(cls, field), hints(cls)[field], value)


def from_json(cls: type[T], values: Any, where: str) -> T:
    """Build a dataclass from a JSON object that has exactly its fields, each of its type.

    Raises:
        ConfigError: with every problem found; `where` is put before each.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {shown(values)}; it must be a map")
    given = cast("Mapping[str, Any]", values)
    known = {f.name: f for f in fields(cast("Any", cls))}
    problems = [(f"{where}: {name!r} is unknown", "was it written by a newer version of Byway?") for name in given if name not in known]
    problems += [(f"{where}: {name} is missing", "") for name, f in known.items() if required(f) and name not in given]
    found: dict[str, Any] = {}
    for name in known.keys() & given.keys():
        found[name], wrongs = checked(cls, name, given[name])
        problems += [(f"{where}: {name}{why}", hint) for why, hint in wrongs]
    if problems:
        raise ConfigError(*together(sorted(problems)))
    return cls(**found)


def wrong(annotation: Any, value: Any) -> list[tuple[str, str]]:
    """Return the problems of a value for an annotation, in the form of :func:`checked`."""
    return _checked(_typed(annotation), annotation, value)[1]


def _checked(adapter: TypeAdapter[Any], annotation: Any, value: Any) -> tuple[Any, list[tuple[str, str]]]:
    """Check the value as it is, or else with its sequences as tuples or as lists."""
    from pydantic import ValidationError

    if half := next(filter(None, map(half_character, _texts(value))), ""):
        return None, [(f" contains {half}, half of a character, which no file can store", "")]
    for candidate in (value, _normalized(value), _normalized(value, list)):
        with suppress(ValidationError):
            return adapter.validate_python(candidate), []
    return None, list(_causes(annotation, _normalized(value)))


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in cast("Mapping[Any, Any]", value).items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in cast("Sequence[Any]", value):
            yield from _texts(item)


def _normalized(value: Any, sequence: type[tuple[Any, ...] | list[Any]] = tuple) -> Any:
    """`value` with paths as strings, mappings as dicts, and lists, ranges and (sorted) sets as tuples or lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, Mapping):
        return {key: _normalized(item, sequence) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, Set):
        value = sorted(cast("Set[Any]", value), key=str)
    items = cast("Sequence[Any]", value)
    return sequence(_normalized(item, sequence) for item in items) if isinstance(value, (list, tuple, range)) else value


@cache
def _adapter(cls: type, field: str) -> TypeAdapter[Any]:
    return _typed(hints(cls)[field])


def _typed(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))
    except PydanticUserError:
        return TypeAdapter(Any)


def _causes(annotation: Any, value: Any) -> Iterator[tuple[str, str]]:
    """Why `value` does not fit: the wrong entries of a list or map if the annotation allows one, or the whole value."""
    entries = [(key, problem) for key, item, allowed in _entries(annotation, value) for problem in wrong(allowed, item)]
    if entries:
        yield from ((f"[{key!r}]{why}", hint) for key, (why, hint) in entries[:3])
        if entries[3:]:
            yield f" has {len(entries) - 3} more entries like these", ""
        return
    planned = isinstance(value, str) and any(value in later.values for later in _extras(annotation, Later))
    must = "which does not exist yet; for now it must be" if planned else "it must be"
    hints = [nearest(str(value), entry.names()) for entry in _extras(annotation, Entry) if not planned]
    yield f" is {shown(plain(value))}{', ' if planned else '; '}{must} {described(annotation)}", "".join(hints)


def _entries(annotation: Any, value: Any) -> list[tuple[Any, Any, Any]]:
    """(key or index, entry, annotation of entries) of a list or map, if `annotation` allows one."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _entries(args[0], value)
    if origin in (Union, types.UnionType):
        return next((found for arg in args if (found := _entries(arg, value))), [])
    if isinstance(value, tuple) and _is_list(annotation):
        return [(i, item, args[0]) for i, item in enumerate(cast("Sequence[Any]", value))]
    if isinstance(value, dict) and _is_map(origin):
        return [(key, item, args[1]) for key, item in cast("dict[Any, Any]", value).items()]
    return []


def _extras(annotation: Any, kind: type) -> list[Any]:
    """The extras of one kind that ``Annotated`` adds to a type."""
    return [extra for extra in get_args(annotation) if isinstance(extra, kind)]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (Sequence, list) or (get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis)


def _is_map(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, Mapping)


_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "booleans"),
    int: ("an integer", "integers"),
    str: ("a string", "strings"),
    float: ("a number", "numbers"),
    type(None): ("null", "null"),
    Any: ("any value", "any values"),
}


def described(annotation: Any, *, plural: bool = False) -> str:
    """Say what an annotation allows: ``"an integer ≥ 1 or null"``; in the plural without limits, ``"integers"``."""
    if annotation in _WORDS:
        return _WORDS[annotation][plural]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for entry in _extras(annotation, Entry):
            return f"{_either(entry.names())}, or an import path (package.module:Class)"
        words = described(args[0], plural=plural)
        return words if plural else _limited(words, args[1:])
    if origin is Literal:
        return _either([str(value) for value in args])
    if origin in (Union, types.UnionType):
        words = [map(str, get_args(arg)) if get_origin(arg) is Literal else [described(arg, plural=plural)] for arg in args]
        return _either(list(itertools.chain.from_iterable(words)))
    if _is_list(annotation):
        return f"a list of {described(args[0], plural=True)}"
    if _is_map(origin) and not plural:
        return f"a map of {described(args[0], plural=True)} to {described(args[1], plural=True)}"
    if _is_map(origin or annotation):
        return "maps" if plural else "a map"
    return str(annotation)


def _either(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    nested = any(" or " in word for word in words)
    return f"{', '.join(words[:-1])}{',' if nested else ''} or {words[-1]}"


def _limited(words: str, extras: Sequence[Any]) -> str:
    """`words` with their limits: ``a number > 0``, ``an integer from 1 to 9``, ``a non-empty string``."""
    # pydantic's Field(...) keeps its limits in `metadata`
    metadata = [one for extra in extras for one in getattr(extra, "metadata", (extra,))]
    limits = {name: limit for one in metadata for name in _SIGNS if (limit := getattr(one, name, None)) is not None}
    if "ge" in limits and "le" in limits:
        return f"{words} from {limits['ge']:,} to {limits['le']:,}"
    if limits.get("min_length", 0) > 1:
        return f"{words} with at least {limits['min_length']} entries"
    if limits.keys() & {"min_length", "pattern"}:
        return words.replace("a ", "a non-empty " if "min_length" in limits else "a non-blank ", 1)
    return f"{words} {' and '.join(f'{_SIGNS[name]} {limit:,}' for name, limit in limits.items())}".rstrip()


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "", "pattern": ""}


def shown(value: Any) -> str:
    """A value as the user may have typed it, at most 60 characters."""
    words = {None: "null", True: "true", False: "false"}
    try:
        text = words[value] if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes integers of up to 4300 digits
        return "too long to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."


def required(field: DataclassField[Any]) -> bool:
    """True if a dataclass field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def plain(value: Any) -> Any:
    """`value` with tuples as lists and mappings as dicts at every depth, as YAML and JSON write them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return [plain(item) for item in cast("Sequence[Any]", value)] if isinstance(value, (list, tuple)) else value


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Field → the string under it, on one line; ``""`` where there is none or the source is not available."""
    docs: dict[str, str] = {f.name: "" for f in fields(cls)}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # a class defined in a console has no source: its fields stay undocumented
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for statement, after in itertools.pairwise(body):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))) if name in docs:
                    docs[name] = " ".join(inspect.cleandoc(text).split())
                case _:
                    pass
    return docs


def summary_line(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").strip().partition("\n")[0]


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema of a dataclass: types, limits, defaults, and the strings under the fields as descriptions."""
    from pydantic.errors import PydanticInvalidForJsonSchema

    docs = field_docs(cls)
    properties: dict[str, Any] = {}
    for f in fields(cls):
        try:
            entry = _adapter(cls, f.name).json_schema()
        except PydanticInvalidForJsonSchema:
            entry = {}  # a class that no file can hold
        if not required(f):
            entry["default"] = plain(f.default if f.default_factory is MISSING else f.default_factory())
        properties[f.name] = entry | ({"description": docs[f.name]} if docs[f.name] else {})
    needed = [f.name for f in fields(cls) if required(f)]
    schema: dict[str, Any] = {"type": "object", "description": summary_line(cls), "properties": properties, "additionalProperties": False}
    return schema | ({"required": needed} if needed else {})
