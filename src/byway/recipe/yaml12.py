"""Reads YAML 1.2 (core scalars) safely, and writes it.

What differs from PyYAML's own loaders: ``1e-4`` is a number; only ``true`` and ``false`` are booleans, ``on``, ``off``, ``yes`` and ``no``
are words; a key given twice is an error that names both lines; nothing is ever constructed but dicts, lists and scalars; size, depth and
the growth through aliases are bounded before anything is built. Every error carries ``file:line:column``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml
from yaml.reader import Reader
from yaml.scanner import ScannerError

from byway.errors import ConfigError

__all__ = ["Document", "dump", "parse", "parse_value", "scalar"]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000

Path = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_OCT = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}
_MAX_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + "str": str, _TAG + "int": int, _TAG + "float": float, _TAG + "bool": bool, _TAG + "null": type(None)}
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}


@dataclass(frozen=True)
class Document:
    """What a YAML text says, and on which line each key stands."""

    value: Any
    lines: Mapping[Path, int]
    """Key path → line, from 1; list items by index."""


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar by the rules of YAML 1.2's core schema; whatever is not null, a boolean or a number is a string."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCT.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INF.fullmatch(text):
        return float(f"{match[1]}inf")
    return float("nan") if text in _NAN else text


def parse(data: bytes, name: str) -> Document:
    """Read one YAML document.

    Args:
        data: the file's bytes: UTF-8, with or without a byte order mark; any line ends.
        name: the file's name, for errors.

    Raises:
        ConfigError: not readable as YAML 1.2, a key twice, a tag that asks for an object, or beyond the bounds above.
    """
    if len(data) > MAX_BYTES:
        size = f"{len(data):,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise ConfigError(f"{name}: {size}", "rows of data go into files that the recipe names")
    return _Builder(_decode(data, name), name).build()


def parse_value(text: str, name: str) -> Any:
    """One value as it stands after ``key=`` on the command line: a scalar, ``[a, b]`` or ``{a: 1}``; nothing is null."""
    return parse(text.encode(errors="surrogateescape"), name).value


def _decode(data: bytes, name: str) -> str:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ConfigError(f"{name}:1:1: the file is {encoding}", "save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _position(data[: error.start].decode("utf-8", errors="replace"))
        raise ConfigError(f"{name}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8") from None
    bad = Reader.NON_PRINTABLE.search(text)
    if bad:
        line, column = _position(text[: bad.start()])
        hint = "save the file as UTF-8" if "\0" in text else ""
        raise ConfigError(f"{name}:{line}:{column}: character U+{ord(bad[0]):04X} is not allowed in YAML", hint)
    return text


def _position(before: str) -> tuple[int, int]:
    """Line and column, from 1, of the character after `before`."""
    lines = before.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return len(lines), len(lines[-1]) + 1


@dataclass
class _Open:
    """A list or mapping whose end has not come yet."""

    value: list[Any] | dict[str, Any]
    path: Path
    anchor: str | None
    first_node: int
    key: str | None = None
    """In a mapping: the key that waits for its value."""


class _Loader(yaml.SafeLoader):
    """Counts brackets while scanning: PyYAML looks a thousand characters ahead, in quadratic time, before it says that one has opened."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise ScannerError(None, None, f"nested more than {MAX_DEPTH} deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)  # pyright: ignore[reportUnknownMemberType] - untyped in PyYAML


class _Builder:
    """Turns the parser's events into values with a stack of its own: no recursion, so depth is a number and not a crash."""

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.stack: list[_Open] = []
        self.result: Any = None
        self.lines: dict[Path, int] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0
        self.documents = 0

    def build(self) -> Document:
        try:
            for event in yaml.parse(self.text, Loader=_Loader):
                self.take(event)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = error.problem or error.context or "not YAML"
            hint = ""
            if "'\\t'" in problem:
                problem, hint = "a tab stands where the indentation is", "indent with spaces"
            raise ConfigError(f"{self.at(mark)}: {problem}", hint) from None
        return Document(self.result, self.lines)

    def at(self, mark: Any) -> str:
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else self.name

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    raise ConfigError(f"{self.at(event.start_mark)}: a second document begins here; there may be one", "remove the '---'")
            case yaml.ScalarEvent():
                self.put(self.scalar(event), event, event.anchor, self.nodes)
            case yaml.AliasEvent():
                self.put_alias(event)
            case yaml.SequenceStartEvent():
                self.open([], event)
            case yaml.MappingStartEvent():
                self.open({}, event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                top = self.stack.pop()
                self.put(top.value, event, top.anchor, top.first_node, opened=True)
            case _:
                pass

    def count(self, nodes: int, event: yaml.Event) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise ConfigError(f"{self.at(event.start_mark)}: more than {MAX_NODES:,} values, aliases counted as often as they are used")

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        tag = event.tag
        if tag is None or tag == "!":
            return scalar(event.value) if event.implicit[0] and tag is None else event.value
        wanted = _SCALAR_TAGS.get(tag)
        if wanted is None:
            raise self.tag_error(event, tag)
        value = event.value if wanted is str else scalar(event.value)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"{self.at(event.start_mark)}: {event.value!r} does not fit its tag !!{tag.removeprefix(_TAG)}")
        return value

    def tag_error(self, event: yaml.Event, tag: str) -> ConfigError:
        shown = tag.replace(_TAG, "!!")
        return ConfigError(f"{self.at(event.start_mark)}: the tag {shown} is not allowed; a recipe holds only plain values", "remove it")

    def open(self, value: list[Any] | dict[str, Any], event: yaml.CollectionStartEvent) -> None:
        if event.tag not in (None, "!", _TAG + ("seq" if isinstance(value, list) else "map")):
            raise self.tag_error(event, str(event.tag))
        if len(self.stack) >= MAX_DEPTH:
            raise ConfigError(f"{self.at(event.start_mark)}: nested more than {MAX_DEPTH} deep")
        if self.stack and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None:
            raise ConfigError(f"{self.at(event.start_mark)}: a list or mapping cannot be a key")
        path = self.path_of_next()
        self.lines.setdefault(path, _line(event))
        self.stack.append(_Open(value, path, event.anchor, self.nodes))

    def path_of_next(self) -> Path:
        if not self.stack:
            return ()
        top = self.stack[-1]
        return (*top.path, len(top.value) if isinstance(top.value, list) else str(top.key))

    def put_alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self.anchors:
            inside = any(item.anchor == event.anchor for item in self.stack)
            why = "stands inside itself" if inside else "is not defined above"
            raise ConfigError(f"{self.at(event.start_mark)}: *{event.anchor} {why}")
        value, size = self.anchors[event.anchor]
        self.count(size, event)
        self.put(_copy(value), event, None, self.nodes)

    def put(self, value: Any, event: yaml.Event, anchor: str | None, first_node: int, *, opened: bool = False) -> None:
        """`value` is complete: hand it to the list, the mapping (as key or value) or the document it stands in."""
        self.count(1, event)
        if anchor is not None:
            self.anchors[anchor] = (value, self.nodes - first_node)
        if not self.stack:
            self.result = value
            return
        top = self.stack[-1]
        if isinstance(top.value, list):
            if not opened:
                self.lines[self.path_of_next()] = _line(event)
            top.value.append(value)
        elif top.key is None:
            top.key = self.new_key(top, value, event)
        else:
            top.value[top.key] = value
            top.key = None

    def new_key(self, top: _Open, value: Any, event: yaml.Event) -> str:
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{self.at(event.start_mark)}: a list or mapping cannot be a key")
        key = value if isinstance(value, str) else event.value if isinstance(event, yaml.ScalarEvent) else str(value)
        path = (*top.path, key)
        if key in top.value:
            raise ConfigError(
                f"{self.at(event.start_mark)}: the key {key!r} stands here and on line {self.lines[path]}", "keep one of the two"
            )
        self.lines[path] = _line(event)
        return key


def _line(event: yaml.Event) -> int:
    mark: Any = event.start_mark
    return mark.line + 1


def _copy(value: Any) -> Any:
    """A copy of plain values; depth is bounded by the reader."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in cast("dict[str, Any]", value).items()}
    return [_copy(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read back as the same value."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar(_TAG + "str", text, style=style)  # pyright: ignore[reportUnknownMemberType]


def _represent_float(dumper: _Dumper, number: float) -> yaml.ScalarNode:
    if number.is_integer() and abs(number) < 1e6:
        return dumper.represent_scalar(_TAG + "int", str(int(number)))  # pyright: ignore[reportUnknownMemberType]
    return dumper.represent_float(number)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def dump(value: Mapping[str, Any]) -> str:
    """Mappings, lists and scalars as YAML; keys keep their order; whole floats lose their ``.0``, which the field's type brings back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
