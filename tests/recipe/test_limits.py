"""Every number in a recipe has an upper limit, which is checked, and at which a run can still be prepared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from byway.errors import ConfigError
from byway.recipe.recipe import Recipe
from byway.recipe.schema import schema
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, llama_dir, make_recipe, one_thread  # noqa: F401

NUMBERS = ("integer", "number")
LIMITS = ("maximum", "exclusiveMaximum")


def numbers(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each number that the schema allows, with the keys that lead to it; ``[]`` and ``{}`` for entries of lists and maps."""
    for choice in node.get("anyOf", ()):
        yield from numbers(choice, path)
    for name, entry in node.get("properties", {}).items():
        yield from numbers(entry, (*path, name))
    if isinstance(node.get("items"), dict):
        yield from numbers(node["items"], (*path, "[]"))
    if isinstance(node.get("additionalProperties"), dict):
        yield from numbers(node["additionalProperties"], (*path, "{}"))
    if node.get("type") in NUMBERS:
        yield path, node


def fields() -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """The numbers of all sections, and of each method under ``method.<name>``."""
    top = schema()["properties"]
    found = [pair for name in ("base", "data", "train", "engine") for pair in numbers(top[name], (name,))]
    for method in top["method"]["anyOf"][0]["anyOf"]:
        found += numbers(method, ("method", method["title"]))
    return found


FIELDS = fields()


def test_the_fields_were_found() -> None:
    paths = {".".join(path) for path, _ in FIELDS}
    assert len(FIELDS) > 80
    assert {
        "train.threads",
        "data.max_length",
        "method.lora.layers.[]",
        "method.adalora.rank_pattern.{}",
        "train.micro_batch_tokens",
    } <= paths


@pytest.mark.parametrize(("path", "node"), FIELDS, ids=[".".join(path) + f" {node['type']}" for path, node in FIELDS])
def test_every_number_has_an_upper_limit_that_is_checked(path: tuple[str, ...], node: dict[str, Any]) -> None:
    limits = [node[name] for name in LIMITS if name in node]
    assert limits, "no upper limit: a huge value would hang or fill the memory"
    for value in (10**12, 10**30, 10**400):
        keys, given = list(path), value
        while keys[-1] in ("[]", "{}"):
            given = [given] if keys.pop() == "[]" else {"a": given}
        values: dict[str, Any] = {"method": {"name": "lora"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}
        if keys[0] == "method":
            values["method"] = {"name": keys[1], keys[2]: given}
        else:
            values[keys[0]] = {**values.get(keys[0], {}), keys[1]: given}
        with pytest.raises(ConfigError) as caught:
            Recipe.from_dict(values)
        assert f"{keys[0]}.{keys[-1]}" in caught.value.message and "must be" in caught.value.message


SECTIONS = [(path[0], path[1], node["maximum"]) for path, node in FIELDS if path[0] != "method" and "maximum" in node]
WITH: dict[str, dict[str, Any]] = {
    "rows_per_step": {"tokens_per_step": None},
    "tokens_per_step": {"rows_per_step": None},
    "warmup_steps": {"warmup_ratio": None, "max_steps": None},
}
NEVER = {"warmup_steps"}
"""At its limit the warm-up is longer than any run."""


@pytest.mark.parametrize(("section", "field", "limit"), SECTIONS, ids=[f"{section}.{field}" for section, field, _ in SECTIONS])
def test_a_run_at_the_limit_can_be_prepared(make_recipe: RecipeMaker, section: str, field: str, limit: int) -> None:  # noqa: F811
    """Within the test's few seconds and little memory: nothing is allocated, or counted out, in proportion to the value."""
    recipe = make_recipe(**{section: {field: limit, **WITH.get(field, {})}})
    if field in NEVER:
        with pytest.raises(ConfigError, match=field):
            prepare(Recipe.from_dict(recipe), note=lambda text: None)
        return
    assert prepare(Recipe.from_dict(recipe), note=lambda text: None).plan.steps >= 1
