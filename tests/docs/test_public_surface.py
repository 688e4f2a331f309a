"""The public names, and what holds for every file of the package."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import byway
from byway import methods

PACKAGE = Path(byway.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CONTRACT = {
    "load_base", "attach", "detach", "side_paths", "activate", "disabled", "adapters", "base_state_dict", "load", "merge", "merge_files",
    "train", "Recipe", "Run", "Site", "SidePath", "Method", "Adapter", "MergeReport",
    "LoRA", "DoRA", "AdaLoRA", "WeightChain", "PromptTuning", "PTuning", "PrefixTuning", "PTuningV2", "IA3", "BitFit", "LayerNormTuning",
    "BottleneckAdapter", "ParallelAdapter", "LadderSideTuning", "Full", "load_loralib",
    "BywayError", "ConfigError", "TargetError", "AdapterError", "DataError", "NotMergeable", "RunError",
}  # fmt: skip


def test_the_names_are_those_of_the_contract_and_each_is_there() -> None:
    assert set(byway.__all__) == CONTRACT
    assert len(byway.__all__) == len(CONTRACT)
    for name in byway.__all__:
        assert inspect.getdoc(getattr(byway, name)), f"byway.{name} says nothing of itself"
    assert set(byway.__all__) <= set(dir(byway))


def test_a_name_that_is_almost_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(AttributeError, match="did you mean 'attach'"):
        byway.attachh  # noqa: B018


def test_a_function_can_be_called_when_the_module_of_its_name_is_imported_first() -> None:
    code = (
        "import byway, byway.merge, byway.merge_files, byway.train.loop\n"
        "print([callable(getattr(byway, name)) for name in ('merge', 'merge_files', 'train')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True, True]"


def test_importing_byway_imports_nothing_heavy() -> None:
    code = "import sys, byway; print(sorted({'torch', 'transformers', 'datasets', 'pydantic', 'typer', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree), "the file says nothing of itself"
    long = [f"{f.name}: {(f.end_lineno or 0) - f.lineno + 1} lines" for f in functions(tree) if (f.end_lineno or 0) - f.lineno + 1 > 60]
    assert not long


@pytest.mark.parametrize("name", ["core.py", "slots.py", "method.py", "watch.py", "summary.py", "merge.py"])
def test_the_core_knows_no_methods_name(name: str) -> None:
    """Of what exists and of what is planned; ``__init__`` lists classes for import and is no part of the core."""
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    words = {
        node.value.lower()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    }
    words |= {node.id.lower() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr.lower() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = [alias for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    words |= {alias.name.lower() for alias in imported}
    names = {n for method in methods.names() if method != "full" for n in (method, method.replace("_", ""))}
    assert {word for word in words if word in names or word.startswith("lora")} == set()


def top_level_imports(path: Path) -> set[str]:
    """Modules of the package that `path` imports when it is imported itself (not inside functions, not for types alone)."""
    own = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    known = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for f in FILES}
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("byway"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found - {own}


def test_no_module_imports_itself_through_others() -> None:
    graph = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): top_level_imports(f) for f in FILES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_public_name_of_a_module_is_there_and_documented() -> None:
    silent: list[str] = []
    for info in pkgutil.walk_packages([str(PACKAGE)], prefix="byway."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in vars(module).get("__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not inspect.getdoc(value):
                silent.append(f"{info.name}.{name}")
    assert not silent
