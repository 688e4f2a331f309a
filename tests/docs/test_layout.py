"""The layout of the package: what imports what, how long files and functions are, and that one new thing is one new file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import byway

PACKAGE = Path(byway.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "errors", "core", "data", "base", "engine", "methods", "formats", "recipe", "tasks", "train", "inference", "workshop", "compat",
    "cli",
)  # fmt: skip
"""The packages, lowest layer first: each imports only from itself and from those before it."""
UPWARD = {("byway.core.adapter", "byway.formats.save")}
"""The one import upward: ``Adapter.save``, inside the function."""
FACES = {"byway", "byway.core"}
"""Packages whose ``__init__`` lists names for users and imports them when they are first used."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere: at the top, inside functions, for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module is not None and node.module.partition(".")[0] == "byway":
                inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES else node.module for name in inner.values()}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {module_name(path), "byway"}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def test_the_graph_was_read() -> None:
    assert sum(map(len, GRAPH.values())) > 500
    assert "byway.core.slots" in GRAPH["byway.core.attach"]
    assert {(name, other) for name, others in GRAPH.items() for other in others} >= UPWARD, "an import inside a function"


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a cycle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(GRAPH[name]):
                if (name, other) not in UPWARD:
                    visit(other, (*way, name))
            done.add(name)

    for name in GRAPH:
        if name not in FACES:
            visit(name, ())


def test_a_cycle_would_be_found() -> None:
    ring = {"a": {"b"}, "b": {"c"}, "c": {"a"}}

    def reaches(name: str, goal: str, seen: frozenset[str]) -> bool:
        return any(other == goal or (other not in seen and reaches(other, goal, seen | {other})) for other in ring[name])

    assert reaches("a", "a", frozenset())


def test_the_one_import_upward_closes_no_cycle() -> None:
    reached, waiting = set(), [other for _, other in UPWARD]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += GRAPH[name]
    assert reached.isdisjoint({name for name, _ in UPWARD})


def test_a_package_imports_only_from_lower_ones() -> None:
    def layer(name: str) -> int:
        return ORDER.index(name.split(".")[1])

    upward = {
        (name, other)
        for name, others in GRAPH.items()
        if name not in ("byway", "byway.__main__")
        for other in others
        if layer(other) > layer(name)
    }
    assert upward == UPWARD


def test_code_inside_the_package_does_not_use_the_face_of_the_core() -> None:
    assert not [name for name, others in GRAPH.items() if "byway.core" in others]


def test_every_package_of_the_order_exists_and_the_root_is_small() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert entries == {*ORDER[1:], "errors.py", "__init__.py", "__main__.py"}
    assert len(entries) <= 16


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 600
    assert ast.get_docstring(tree), "the file has no docstring"
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree)}
    assert not {name: lines for name, lines in lengths.items() if lines > 100}
