"""Step 1: what the pages say is well formed, exists, and is what the code says. Step 2 is test_docs_run.py."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from byway import errors, methods
from byway.cli import COMMANDS, available, main
from byway.data.formats import FORMATS, detect
from byway.data.rows import Row
from byway.recipe.recipe import Recipe
from tests.docs.pages import PAGES, ROOT, blocks, commands

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLE_NAMES = ("scale.",)
"""Files that CONTRIBUTING.md tells its reader to write."""

Help = Callable[[str], str]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Help:
    def text(command: str) -> str:
        assert main([command, "--help"]) == 0
        return capsys.readouterr().out

    return text


def test_the_readme_has_its_parts() -> None:
    readme = ROOT / "README.md"
    assert [len(blocks(readme, language)) for language in ("sh", "python", "text", "yaml")] == [3, 2, 1, 1]
    code = [line for line in blocks(readme, "python")[0].text.splitlines() if line.strip()]
    assert len(code) == 6
    first = {words[1] for _, words in commands(readme) if words[0] == "make"}
    assert first == {"quickstart", "test"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_and_takes_its_options(page: Path, help_of: Help) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for where, words in commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{where}: make {words[1]} does not exist"
            continue
        assert words[1].startswith("-") or words[1] in available(), f"{where}: byway {words[1]} does not exist"
        if words[1].startswith("-"):
            continue
        text = help_of(words[1])
        for option in (word for word in words[2:] if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{where}: byway {words[1]} has no {option}"


def test_commands_were_found_at_all() -> None:
    used = {words[1] for page in PAGES for _, words in commands(page) if words[0] == "byway"}
    assert {"train", "data", "doctor", "eval", "generate", "merge", "schema"} <= used
    assert set(available()) <= used, "every command that exists stands in some page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_file_and_test_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in re.findall(r"`(?:\.venv/bin/python )?((?:src|tests|docs|recipes|examples)/[\w./-]+?\.\w+(?:::\w+)?)`", text):
        file, _, test = name.partition("::")
        if any(example in file for example in EXAMPLE_NAMES):
            continue
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {name}"


def test_what_is_written_from_the_code_is_what_the_code_says() -> None:
    import reference

    for name in reference.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "<!-- begin: " in text
        assert reference.rendered(text) == text, f"{name} is out of date: run python docs/reference.py"


def test_every_key_of_a_recipe_stands_in_its_page() -> None:
    from byway.recipe.schema import schema

    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for section in ("base", "data", "train", "engine"):
        part = text.split(f"<!-- begin: {section} -->")[1].split("<!-- end")[0]
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(schema()["properties"][section]["properties"])


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    import sketch

    for name, path in sketch.pictures().items():
        sketch.render(name, tmp_path / "drawn.svg")
        assert (tmp_path / "drawn.svg").read_bytes() == path.read_bytes(), f"run python docs/figures {name}"


@pytest.mark.parametrize("name", methods.names())
def test_every_method_has_a_page_with_its_equation_its_fields_and_a_picture(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert f"]({name}.svg)" in page
    assert (ROOT / "docs" / "methods" / f"{name}.svg").is_file()
    assert f"<!-- begin: fields of {name} -->" in page
    assert "=" in page.split("![")[0], "the equation stands above the picture"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.output.startswith("runs/")
    assert not recipe.notes, "a shipped recipe uses our own keys"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_recipe_in_a_page_loads(tmp_path: Path) -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert len(found) >= 2
    for block in found:
        (tmp_path / "r.yaml").write_text(block.text, encoding="utf-8")
        Recipe.load(tmp_path / "r.yaml")


def test_the_readmes_recipe_is_the_file_that_its_commands_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0].text, encoding="utf-8")
    assert Recipe.load(tmp_path / "r.yaml") == Recipe.load(ROOT / "src/byway/cli/_init/chat.yaml")


def test_values_written_differently_elsewhere_are_read_as_the_page_says() -> None:
    read = Recipe.from_dict(
        {"dataset_name": "a/b", "lora_target": "all", "max_steps": -1, "val_set_size": 0, "data": {}, "output": "runs/x"}
    )
    assert (read.data.train, read.method[0].targets, read.train.max_steps, read.data.eval_fraction) == ("hub:a/b", "all-linear", None, None)  # type: ignore[attr-defined]
    read = Recipe.from_dict({"lora_target": "q_proj,v_proj", "data": {"train": "x"}, "output": "runs/x"})
    assert read.method[0].targets == ("q_proj", "v_proj")  # type: ignore[attr-defined]


def test_every_dependency_is_defended() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = re.compile(r"[\w-]+")
    plain, optional = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").split("## Optional groups")
    defended = [package for package, why in re.findall(r"^\| ([\w-]+) \| ([^|]+) \|$", plain, re.MULTILINE) if "---" not in why]
    assert defended == ["package", *(name.findall(text)[0] for text in project["dependencies"])]
    groups = {(group, package) for group, package in re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| [^|]+ \|$", optional, re.MULTILINE)}
    wanted = {(g, name.findall(t)[0]) for g, texts in project["optional-dependencies"].items() if g != "dev" for t in texts}
    assert groups - {("group", "package"), ("---", "---")} == wanted


def test_rows_in_the_data_page_are_of_the_form_they_stand_for() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {entry.name for entry in FORMATS}
    for name, row in rows:
        assert detect([Row(json.loads(row), "row 1")]).name == name


def test_the_error_page_has_every_class_with_its_builtin_and_exit_code() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE))
    classes = {name: vars(errors)[name] for name in errors.__all__ if isinstance(vars(errors)[name], type)}
    assert table == {name: cls.__mro__[2].__name__ for name, cls in classes.items() if name != "BywayError"}
    codes = {code for line in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in line.split(", ")}
    assert {str(cls.exit_code) for cls in classes.values()} <= codes == {"0", "1", "2", "3", "129", "130", "143"}


def test_the_methods_code_in_contributing_is_the_example() -> None:
    source = (ROOT / "examples" / "toy_method.py").read_text(encoding="utf-8")
    found = blocks(ROOT / "CONTRIBUTING.md", "python")
    assert len(found) == 2
    for block in found:
        assert block.text in source, f"{block.where} differs from examples/toy_method.py"


def test_the_changelog_has_the_form_it_says() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_nothing_that_does_not_exist_is_offered() -> None:
    missing = set(COMMANDS) - set(available())
    for page in PAGES:
        for where, words in commands(page):
            assert not (words[0] == "byway" and words[1] in missing), f"{where}: byway {words[1]} does not exist yet"
