"""Reading a run that somebody else may have sent runs none of its code, and finds its base from any directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import byway
from byway.cli import main
from byway.errors import AdapterError, BywayError, ConfigError
from byway.inference.runs import find
from byway.workshop.merge.files import merge_files

MINE = """
from pathlib import Path
from torch import nn
from byway import LoRA
from byway.tasks.chat import Chat
from byway.train.levers.frontier import Frontier
Path({marker!r}).touch()
class Method(LoRA): pass
class Task(Chat): pass
class Lever(Frontier): pass
class Link(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.scale = nn.Parameter(weight.new_ones(()))
    def forward(self, weight):
        return weight * self.scale
"""
PLACES = {
    "method": {"method": {"name": "mine:Method"}},
    "task": {"data": {"train": "rows.jsonl", "task": "mine:Task"}},
    "lever": {"engine": {"levers": ["mine:Lever"]}},
}
COMMANDS = {
    "generate": ["generate", "run", "--prompt", "hi", "--max-new-tokens", "1"],
    "chat": ["chat", "run"],
    "eval": ["eval", "run"],
    "merge": ["merge", "run", "-o", "merged"],
}


@pytest.fixture
def project(chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a base in models/tiny, a run of it in run, and a module that leaves a mark when it is imported."""
    shutil.copytree(chat_base, tmp_path / "project" / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE.format(marker=str(tmp_path / "imported")))
    write_run({})
    return tmp_path / "project"


def write_run(changes: dict[str, Any], method: byway.Method | None = None) -> None:
    model, tokenizer = byway.load_base("models/tiny")
    adapter = byway.attach(model, method or byway.LoRA(rank=2))
    for _, parameter in adapter.named_parameters():
        nn.init.normal_(parameter)
    adapter.save("run/adapter", tokenizer)
    recipe = {"base": {"model": "models/tiny"}, "method": {"name": "lora"}, "data": {"train": "rows.jsonl"}, "output": "run"} | changes
    Path("run/recipe.yaml").write_text(json.dumps(recipe))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_command_imports_nothing_that_a_run_names(project: Path, place: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(PLACES[place])
    assert main(COMMANDS[command]) == 2
    shown = capsys.readouterr().err
    assert "mine:" in shown and "--allow-import" in shown and "recipe.yaml" in shown
    assert not (project.parent / "imported").exists() and "mine" not in sys.modules and not Path("merged").exists()


@pytest.mark.parametrize("place", PLACES)
def test_inspect_shows_such_a_run_and_imports_nothing(project: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(PLACES[place])
    assert main(["inspect", "run"]) == 0
    assert "LORA" in capsys.readouterr().out and not (project.parent / "imported").exists()


@pytest.mark.parametrize("place", PLACES)
def test_with_permission_the_run_is_used(project: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(PLACES[place])
    assert main([*COMMANDS["generate"], "--allow-import"]) == 0, capsys.readouterr().err
    found = find("run", allow_import=True)
    assert found.recipe is not None and (project.parent / "imported").exists() == (place != "lever")


def test_the_users_own_recipe_may_name_anything(project: Path) -> None:
    write_run(PLACES["method"])
    recipe = byway.Recipe.load("run/recipe.yaml")
    assert type(recipe.method[0]).__name__ == "Method"
    with pytest.raises(ConfigError, match=r"recipe\.yaml:1: method\.name names 'mine:Method'"):
        byway.Recipe.load("run/recipe.yaml", allow_import=False)


def test_the_python_functions_ask_for_permission_too(project: Path) -> None:
    write_run(PLACES["method"])
    for call in (lambda: find("run"), lambda: merge_files("models/tiny", "run", "merged")):
        with pytest.raises(BywayError, match="allow_import=True"):
            call()
    assert not (project.parent / "imported").exists()
    assert merge_files("models/tiny", "run", "merged", allow_import=True).certificate


def test_a_link_that_an_adapter_names_is_imported_with_permission_only(project: Path) -> None:
    links = ("low_rank", "mine:Link")
    model, _ = byway.load_base("models/tiny")
    recipe = {"method": {"name": "weight_chain", "links": list(links), "targets": ["q_proj"]}}
    write_run(recipe, byway.WeightChain(links=links, targets=["q_proj"]))
    (project.parent / "imported").unlink()
    del sys.modules["mine"]
    with pytest.raises(AdapterError, match="no code is imported because a file names it"):
        byway.load(model, "run/adapter")
    with pytest.raises(AdapterError, match="no code is imported because a file names it"):
        find("run").load()
    assert not (project.parent / "imported").exists()
    find("run", allow_import=True).load()
    assert (project.parent / "imported").exists()


def test_a_method_that_an_adapter_names_is_imported_with_permission_only(project: Path) -> None:
    model, _ = byway.load_base("models/tiny")
    config = Path("run/adapter/byway_adapter.json")
    write_run({}, byway.BitFit())
    config.write_text(config.read_text().replace('"bitfit"', '"mine:Other"'))
    with pytest.raises(AdapterError, match="no code is imported"):
        byway.load(model, "run/adapter")
    assert "mine" not in sys.modules
    with pytest.raises(BywayError, match="named 'Other'"):
        byway.load(model, "run/adapter", allow_import=True)
    assert "mine" in sys.modules


def test_python_m_byway_imports_nothing_from_the_current_directory(project: Path) -> None:
    write_run(PLACES["method"])
    mark = f"open({str(project.parent / 'imported')!r}, 'w').close()\nraise SystemExit(99)\n"
    for name in ("mine", "typer", "torch", "safetensors", "transformers", "yaml"):
        Path(f"{name}.py").write_text(mark)
    done = subprocess.run([sys.executable, "-m", "byway", "inspect", "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "LORA" in done.stdout, done.stderr
    assert not (project.parent / "imported").exists()


@pytest.mark.parametrize("path", [":", ".x:Y", "..:Y", "a:", ":b", "a.:b", "1a:b", "a b:c", "os:path:x", "é:\ud800"])
def test_a_malformed_import_path_is_an_error_of_the_recipe(path: str) -> None:
    with pytest.raises(ConfigError, match="import path"):
        byway.Recipe.from_dict({"method": {"name": path}, "data": {"train": "rows.jsonl"}, "output": "run"})


@pytest.mark.parametrize("body", ["raise ZeroDivisionError('no')", "def broken(:", "import absent_module", "raise RuntimeError"])
def test_a_module_that_cannot_be_imported_is_named(project: Path, body: str) -> None:
    Path("mine.py").write_text(body)
    with pytest.raises(ConfigError, match="mine"):
        byway.Recipe.from_dict({"method": {"name": "mine:Method"}, "data": {"train": "rows.jsonl"}, "output": "run"})


# ------------------------------------------------------------ a base at a relative path


@pytest.mark.parametrize("place", ["run", "run/adapter"])
def test_a_relative_base_is_found_from_another_directory(project: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(place).base == "models/tiny"
    monkeypatch.chdir(project.parent)
    found = find(f"project/{place}")
    assert found.base == str(project / "models" / "tiny")
    assert isinstance(found.load()[0], nn.Module)


def test_another_base_at_the_same_relative_path_is_not_taken_for_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.parent / "other"
    (other / "models").mkdir(parents=True)
    model, tokenizer = byway.load_base("models/tiny")
    nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other / "models" / "tiny")
    assert tokenizer is not None
    tokenizer.save_pretrained(other / "models" / "tiny")
    monkeypatch.chdir(other)
    assert find("../project/run").base == str(project / "models" / "tiny")
    (project / "models").rename(project / "moved")
    with pytest.raises(AdapterError, match="made for another base"):  # the fingerprint decides
        find("../project/run").load()


@pytest.mark.parametrize("place", ["run", "run/adapter"])
def test_a_relative_base_that_is_gone_names_the_option(
    project: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.parent)
    (project / "models").rename(project.parent / "moved")
    command = ["generate", f"project/{place}", "--prompt", "hi", "--max-new-tokens", "1"]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "'models/tiny', a path relative to the directory that training ran in" in shown and "--base" in shown
    assert main(["inspect", f"project/{place}"]) == 0
    assert main([*command, "--base", "moved/tiny"]) == 0


def test_a_base_that_is_no_path_records_none(project: Path) -> None:
    from byway.formats.record import recorded_path

    model, _ = byway.load_base("models/tiny")
    model.config.name_or_path = "owner/name"
    byway.attach(model, byway.LoRA(rank=2)).save("other")
    assert recorded_path(Path("other")) is None and recorded_path(Path("run/adapter")) == str(project / "models" / "tiny")
