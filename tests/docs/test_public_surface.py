"""The public names, and what holds for every file of the package."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
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


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = {node.module: tuple(alias.name for alias in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert len(imports) == len(block.body)
    assert list(imports.items()) == list(byway._HOME.items())


def test_a_name_that_is_almost_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(AttributeError, match="did you mean 'attach'"):
        byway.attachh  # noqa: B018


def test_a_function_can_be_called_when_the_module_of_its_name_is_imported_first() -> None:
    code = (
        "import byway, byway.core.merge, byway.workshop.merge.files, byway.train.loop\n"
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


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.name)
def test_the_core_knows_no_methods_name(path: Path) -> None:
    """Of what exists and of what is planned; ``__init__`` lists classes for import and is no part of the core."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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


def test_a_file_in_the_folder_of_methods_is_a_method_of_byway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (PACKAGE.parent.parent / "examples" / "toy_method.py").read_text(encoding="utf-8")
    (tmp_path / "scale.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "scale" in methods.names()
    found = byway.Scale
    assert found is methods.load("scale") and byway.Recipe.from_dict(
        {"method": {"name": "scale"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}
    ).method == (found(),)
    monkeypatch.delitem(sys.modules, "byway.methods.scale")
