"""Files and directories, before any work (checks 10 and 11): found, named, and nothing touched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from byway.errors import ConfigError
from byway.recipe.checks import check_paths
from byway.recipe.recipe import Recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    base = Path("base")
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"base": {"model": "base"}, "method": {"name": "lora"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}
    return Recipe.from_dict(values | changes)


def tree(folder: Path) -> str:
    found = sorted((str(p.relative_to(folder)), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def run_directory() -> None:
    Path("runs/x/checkpoints/step-3").mkdir(parents=True)
    Path("runs/x/recipe.yaml").write_text("old", encoding="utf-8")


def refusal(place: Path, made: Recipe, **options: bool) -> str:
    before = tree(place)
    with pytest.raises(ConfigError) as caught:
        check_paths(made, **options)
    assert tree(place) == before and caught.value.exit_code == 2
    return str(caught.value)


def test_a_recipe_whose_files_are_there_passes_and_writes_nothing(place: Path) -> None:
    before = tree(place)
    check_paths(recipe())
    Path("runs/x").mkdir(parents=True)
    check_paths(recipe())
    check_paths(recipe(base={"model": "smollm2-135m-instruct"}, data={"train": "hub:owner/rows"}))
    Path("runs/x").rmdir()
    Path("runs").rmdir()
    assert tree(place) == before


def test_an_output_that_holds_a_run_needs_a_word(place: Path) -> None:
    run_directory()
    assert "already contains a run\nhint: --resume continues it, --overwrite replaces it" in refusal(place, recipe())
    check_paths(recipe(), resume=True)
    check_paths(recipe(), overwrite=True)


def test_an_output_with_other_files_is_never_overwritten(place: Path) -> None:
    run_directory()
    Path("runs/x/thesis.tex").write_text("years of work", encoding="utf-8")
    assert "contains files that do not belong to a run: thesis.tex" in refusal(place, recipe(), overwrite=True)


def test_an_output_that_is_or_lies_under_a_file_is_refused(place: Path) -> None:
    Path("runs").write_text("", encoding="utf-8")
    assert "cannot be created: 'runs' is a file" in refusal(place, recipe())
    assert "is a file" in refusal(place, recipe(output="x.jsonl"))


def test_an_output_inside_the_base_is_refused(place: Path) -> None:
    assert "is inside the base's directory 'base'" in refusal(place, recipe(output="base/runs"))
    assert "is inside the base's directory" in refusal(place, recipe(output="base"))
    os.symlink("base", "link")
    assert "is inside the base's directory" in refusal(place, recipe(output="link/run"))


def test_an_output_without_permission_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so a mode would not do
    assert "cannot be written: no permission" in refusal(place, recipe())


def test_there_must_be_something_to_resume(place: Path) -> None:
    assert "contains no run to resume" in refusal(place, recipe(), resume=True)


def test_missing_data_show_their_nearest_sibling(place: Path) -> None:
    message = refusal(place, recipe(data={"train": ["x.json", "x.jsonl"], "eval": "gone/y.jsonl"}))
    assert "data.train: 'x.json' does not exist (did you mean 'x.jsonl'?)" in message
    assert "data.eval: 'gone/y.jsonl' does not exist (there is no directory 'gone')" in message
    assert "'base' is a directory" in refusal(place, recipe(data={"train": "base"}))


def test_a_missing_base_is_found_without_the_network(place: Path) -> None:
    assert "base.model: the base './bose' does not exist" in refusal(place, recipe(base={"model": "./bose"}))


def test_everything_is_said_at_once(place: Path) -> None:
    message = refusal(place, recipe(base={"model": "./bose"}, data={"train": "no"}, output="x.jsonl"))
    assert message.startswith("3 problems:") and all(part in message for part in ("base.model", "data.train", "output"))
