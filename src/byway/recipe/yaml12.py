"""Read YAML 1.2 (core scalars) safely, and write it.

Differences from PyYAML's own loaders: ``1e-4`` is a number; only ``true`` and ``false`` are booleans, while ``on``,
``off``, ``yes`` and ``no`` are strings; a duplicate key is an error that names both lines; only dicts, lists and
scalars are ever constructed; size, depth and growth through aliases are bounded. Every error carries
``file:line:column``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import Reader
from yaml.scanner import ScannerError

from byway.errors import ConfigError

__all__ = ["Document", "dump", "parse", "parse_value", "scalar"]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000

Path = tuple[str | int, ...]

_SCALARS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"|~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)
"""The plain scalars that are not strings, by the core schema of YAML 1.2.2 (§10.3.2)."""
_MAX_DIGITS = 400

_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"
"""The tag of scalars that are neither quoted nor tagged."""
_DEFAULT_TAGS = {yaml.ScalarNode: _TAG + "str", yaml.SequenceNode: _TAG + "seq", yaml.MappingNode: _TAG + "map"}
_SCALAR_TAGS = {_TAG + "str": str, _TAG + "int": int, _TAG + "float": float, _TAG + "bool": bool, _TAG + "null": type(None)}
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}


@dataclass(frozen=True)
class Document:
    """The value of a YAML text, and the line of each key."""

    value: Any
    lines: Mapping[Path, int]
    """Key path → line, from 1; list items by index."""


_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _joined(halves: re.Match[str]) -> str:
    return halves[0].encode("utf-16", "surrogatepass").decode("utf-16")


def scalar(text: str) -> Any:
    """Read a plain (unquoted) scalar by YAML 1.2's core schema: null, a boolean, a number, or else a string."""
    known = (read for pattern, read in _SCALARS if len(text) <= _MAX_DIGITS and re.fullmatch(pattern, text))
    return next(known, str)(text)


def parse(data: bytes, name: str) -> Document:
    """Read one YAML document.

    Args:
        data: the file's bytes: UTF-8, with or without a byte order mark; any line ends.
        name: the file's name, for errors.

    Raises:
        ConfigError: no valid YAML 1.2, a duplicate key, a tag that asks for an object, or a bound above exceeded.
    """
    if len(data) > MAX_BYTES:
        size = f"{len(data):,} bytes; a recipe has at most {MAX_BYTES:,}"
        raise ConfigError(f"{name}: {size}", "rows of data go into files that the recipe names")
    loader = _Loader(_decode(data, name))
    try:
        node = loader.get_single_node()
    except (ValueError, OverflowError):  # PyYAML computes the character of an escape without checking it
        raise ConfigError(f"{_place(name, loader.get_mark())}: an escape (\\U...) beyond U+10FFFF is no character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem, hint = error.problem or error.context or "not YAML", ""
        if "'\\t'" in problem:
            problem, hint = "a tab is used for indentation", "indent with spaces"
        elif problem == "but found another document":
            problem, hint = "a second document begins here; only one is allowed", "remove the '---'"
        raise ConfigError(f"{_place(name, mark)}: {problem}", hint) from None
    builder = _Builder(name)
    return Document(None if node is None else builder.value(node, ()), builder.lines)


def parse_value(text: str, name: str) -> Any:
    """Read the value after ``key=`` on the command line: a scalar, ``[a, b]`` or ``{a: 1}``; an empty text is null."""
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


def _place(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else name


class _Alias(yaml.Node):
    """``*name``; its value is the node that ``&name`` stands before."""


class _Loader(yaml.SafeLoader):
    """Composes nodes with a bound on depth, leaves plain scalars without a tag, and keeps the places of aliases."""

    open_collections = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # bounded here as well: before it reports a bracket, PyYAML looks a thousand characters ahead, in quadratic time
        if self.flow_level >= MAX_DEPTH:
            raise ScannerError(None, None, _TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(TokenClass)  # pyright: ignore[reportUnknownMemberType] - untyped in PyYAML

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else _DEFAULT_TAGS[kind]

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        anchor, mark = event.anchor, event.start_mark
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            if anchor not in self.anchors:
                raise ComposerError(None, None, f"*{anchor} is not defined above", mark)
            return _Alias(anchor, self.anchors[anchor], mark, None)
        self.anchors.pop(anchor, None)  # an anchor may be defined again
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!":
            event.tag = _TAG + "str"
        collection = isinstance(event, yaml.CollectionStartEvent)
        if collection and self.open_collections >= MAX_DEPTH:
            raise ComposerError(None, None, _TOO_DEEP, mark)
        self.open_collections += collection
        node = super().compose_node(parent, index)
        self.open_collections -= collection
        return node


class _Builder:
    """Turns nodes into values: each alias into a copy, counted like what it stands for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.nodes = 0
        self.open: list[yaml.Node] = []

    def value(self, node: Any, path: Path, alias: _Alias | None = None) -> Any:
        """The value of a node at `path`; `alias` is the outermost alias on the way to it, whose place errors name."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(alias or node, f"more than {MAX_NODES:,} values, counting aliases each time they are used")
        if alias is None:
            self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, _Alias):
            if node.value in self.open:
                raise self.error(alias or node, f"*{node.tag} stands inside itself")
            return self.value(node.value, path, alias or node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag != _DEFAULT_TAGS[type(node)]:
            raise self.tag_error(node)
        if len(self.open) >= MAX_DEPTH:
            raise self.error(alias or node, _TOO_DEEP)
        self.open.append(node)
        if isinstance(node, yaml.SequenceNode):
            found: Any = [self.value(item, (*path, i), alias) for i, item in enumerate(node.value)]
        else:
            found = {}
            for key_node, item in node.value:
                key = self.key(key_node, path, alias)
                if key in found:
                    raise self.error(key_node, f"the key {key!r} stands here and on line {self.lines[(*path, key)]}", "keep one of the two")
                if alias is None:
                    self.lines[(*path, key)] = key_node.start_mark.line + 1
                found[key] = self.value(item, (*path, key), alias)
        self.open.pop()
        return found

    def key(self, node: Any, path: Path, alias: _Alias | None) -> str:
        """A key as it is written: ``1`` and ``true`` are strings here."""
        key = self.value(node, path, alias)
        if isinstance(key, (list, dict)):
            raise self.error(node, "a list or mapping cannot be a key")
        return key if isinstance(key, str) else str((node.value if isinstance(node, _Alias) else node).value)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == _PLAIN:
            return scalar(node.value)
        wanted = _SCALAR_TAGS.get(node.tag)
        if wanted is None:
            raise self.tag_error(node)
        # JSON writes a character beyond U+FFFF as the escapes of two halves
        value = _PAIR.sub(_joined, node.value) if wanted is str else scalar(node.value)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise self.error(node, f"{node.value!r} does not fit its tag !!{node.tag.removeprefix(_TAG)}")
        return value

    def error(self, node: Any, problem: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{_place(self.name, node.start_mark)}: {problem}", hint)

    def tag_error(self, node: Any) -> ConfigError:
        return self.error(node, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; a recipe holds only plain values", "remove it")


class _Dumper(yaml.SafeDumper):
    """Writes YAML that readers of versions 1.1 and 1.2 read as the same value."""

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
    """Write maps, lists and scalars as YAML, keys in order. Whole floats lose ``.0``; the field's type restores it."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
