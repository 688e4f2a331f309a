"""A frozen dataclass's annotations, read three ways: as a strict check, as words for an error, as JSON schema.

The classes stay plain: ``rank: int = 8`` with a string under it. Strict means: ``"4"``, ``true`` and ``4.0`` are no whole numbers, a whole
number is a number, NaN and infinity are not; lists become tuples. Bounds stand in the annotation: ``Annotated[int, Field(ge=1)]``.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import os
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo

from byway.errors import ConfigError

__all__ = [
    "Later",
    "bias_problems",
    "checked",
    "described",
    "dropout_problems",
    "field_docs",
    "finite",
    "hints",
    "json_schema",
    "later",
    "plain",
    "required",
    "shown",
    "summary_line",
    "whole",
]


class Later:
    """In an annotation: values of the contract whose work has not landed; they are refused with 'not yet'."""

    def __init__(self, *values: Any, anything: bool = False) -> None:
        self.values = values
        self.anything = anything
        """Whether every other text is such a value (a directory's name)."""

    def covers(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return value in self.values or (self.anything and isinstance(value, str))


_ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)
_STRICT: dict[Any, Any] = {
    bool: StrictBool,
    int: StrictInt,
    str: StrictStr,
    float: Annotated[StrictFloat, FieldInfo(allow_inf_nan=False)],
    type(None): type(None),
}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "text",
    float: "a number",
    type(None): "null",
    Any: "anything",
}


@cache
def hints(cls: type) -> Mapping[str, Any]:
    """Field → annotation, with what stands in ``Annotated``.

    Raises:
        ConfigError: an annotation cannot be resolved at run time.
    """
    try:
        found = get_type_hints(cls, include_extras=True)
    except NameError as error:
        why = f"{cls.__qualname__}: a field's type cannot be resolved ({error})"
        raise ConfigError(why, "import it outside `if TYPE_CHECKING:`") from None
    return {f.name: found[f.name] for f in fields(cls)}


def checked(cls: type, field: str, value: Any) -> tuple[Any, str]:
    """`value` as the field takes it (lists as tuples), and ``""``; or None and what is wrong: ``"is 0; it must be ..."``."""
    annotation = hints(cls)[field]
    value = _texts(value)
    try:
        return _adapter(cls, field).validate_python(value), ""
    except ValidationError:
        soon = later(annotation)
        if soon is not None and soon.covers(value):
            return None, f"is {shown(value)}, which does not exist yet; today it must be {described(annotation)}"
        return None, f"is {shown(value)}; it must be {described(annotation)}"


def _texts(value: Any) -> Any:
    """Path objects as the text they stand for."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, (list, tuple)):
        texts = [_texts(item) for item in cast("Sequence[Any]", value)]
        return texts if isinstance(value, list) else tuple(texts)
    return value


@cache
def _adapter(cls: type, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(_strict(hints(cls)[field]), config=_ANY_CLASS)


def _strict(annotation: Any) -> Any:
    """The same annotation with scalars that pydantic does not convert into one another."""
    if annotation in _STRICT:
        return _STRICT[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kept = tuple(extra for extra in args[1:] if not isinstance(extra, Later))
        return Annotated[(_strict(args[0]), *kept)] if kept else _strict(args[0])
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(arg) for arg in args)]  # noqa: UP007 - built from a list
    if origin is tuple and args:
        return tuple[tuple(arg if arg is Ellipsis else _strict(arg) for arg in args)]
    if origin is Sequence:  # what Python users may pass as a list; kept as a tuple
        return tuple[_strict(args[0]), ...]
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return dict[_strict(args[0]), _strict(args[1])]
    if inspect.isclass(annotation) and issubclass(annotation, Mapping):
        return dict[str, Any]
    return annotation


def later(annotation: Any) -> Later | None:
    """The :class:`Later` of an annotation, if it has one."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, Later)), None)


def described(annotation: Any) -> str:
    """An annotation in words: ``"a whole number of at least 1, or null"``."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(args[0]) + _bounds(args[1:])
    if origin is Literal:
        return _either([str(value) for value in args])
    if origin in (Union, types.UnionType):
        words = [[str(v) for v in get_args(arg)] if get_origin(arg) is Literal else [described(arg)] for arg in args]
        return _either([word for several in words for word in several])
    if origin is tuple and args:
        return f"a list of {_plural(_unbound(args[0]))}" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    if origin is Sequence:
        return f"a list of {_plural(_unbound(args[0]))}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"a mapping from {_plural(described(args[0]))} to {_plural(described(args[1]))}"
    return "a mapping" if inspect.isclass(annotation) and issubclass(annotation, Mapping) else str(annotation)


def _unbound(annotation: Any) -> str:
    return described(get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation)


def _plural(words: str) -> str:
    known = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "true or false": "true or false"}
    return known.get(words, words)


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


_BOUND_WORDS: tuple[tuple[type, Callable[[Any], str]], ...] = (
    (annotated_types.Ge, lambda bound: f"of at least {bound.ge}"),
    (annotated_types.Gt, lambda bound: f"above {bound.gt}"),
    (annotated_types.Le, lambda bound: f"of at most {bound.le}"),
    (annotated_types.Lt, lambda bound: f"below {bound.lt}"),
    (annotated_types.MinLen, lambda bound: f"with at least {bound.min_length} entries" if bound.min_length > 1 else "that is not empty"),
)


def _bounds(extras: tuple[Any, ...]) -> str:
    bounds = [b for extra in extras if isinstance(extra, FieldInfo) for b in extra.metadata]
    words = [word(b) for b in bounds for kind, word in _BOUND_WORDS if isinstance(b, kind)]
    return f" {' and '.join(words)}".replace(" and of ", " and ") if words else ""


def shown(value: Any) -> str:
    """A value as the user may have typed it, at most 60 characters."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def required(field: Field[Any]) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, all the way down: what YAML and JSON can write."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return [plain(item) for item in cast("Sequence[Any]", value)] if isinstance(value, (list, tuple)) else value


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Field → the string that stands under it, on one line; ``""`` where there is none or the source is not at hand."""
    docs: dict[str, str] = {f.name: "" for f in fields(cls)}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # a class made in a console has no source; its fields stay without words
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
    lines = (inspect.getdoc(cls) or "").strip().splitlines()
    return lines[0] if lines else ""


def json_schema(cls: type) -> dict[str, Any]:
    """JSON schema of a dataclass: types, bounds, defaults, and the strings under the fields as descriptions."""
    docs = field_docs(cls)
    properties: dict[str, Any] = {}
    for f in fields(cls):
        try:
            entry = _adapter(cls, f.name).json_schema()
        except PydanticInvalidForJsonSchema:
            entry = {}  # a class of one's own: nothing that a file can hold
        if f.default is not MISSING:
            entry["default"] = plain(f.default)
        elif f.default_factory is not MISSING:
            entry["default"] = plain(f.default_factory())
        properties[f.name] = entry | ({"description": docs[f.name]} if docs[f.name] else {})
    needed = [f.name for f in fields(cls) if required(f)]
    schema: dict[str, Any] = {"type": "object", "description": summary_line(cls), "properties": properties, "additionalProperties": False}
    return schema | ({"required": needed} if needed else {})


def whole(value: Any) -> bool:
    """Whether `value` is a whole number (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    """Whether `value` is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dropout_problems(value: Any) -> list[str]:
    """What is wrong with a dropout rate; nothing where it is in [0, 1)."""
    return [] if finite(value) and 0 <= value < 1 else [f"dropout is {value!r}; it must be at least 0 and below 1"]


def bias_problems(value: Any) -> list[str]:
    """What is wrong with a choice of biases that are trained too."""
    return [] if value in ("none", "all", "lora_only") else [f"bias is {value!r}; it must be none, all or lora_only"]
