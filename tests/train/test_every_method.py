"""Every method, and several at once, through a whole run: train, stop, resume exactly, evaluate, generate, load."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import byway
from byway import methods
from byway.inference.evaluate import evaluate_run
from byway.inference.generate import generate_text
from byway.inference.runs import find
from byway.train import Stopped, train
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses

pytestmark = pytest.mark.usefixtures("quick_picture")
FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 1, "initial_rank": 3, "initial_steps": 1, "final_steps": 1},
    "prefix_tuning": {"hidden_size": 16},
    "bottleneck_adapter": {"reduction": 4},
}
SEVERAL: list[list[dict[str, Any]]] = [
    [{"name": "lora", "rank": 2, "targets": "attention"}, {"name": "prompt_tuning", "num_virtual_tokens": 3}],
    [{"name": "lora", "rank": 2, "targets": "attention"}, {"name": "bottleneck_adapter", "reduction": 4, "norms": False}],
    [{"name": "prefix_tuning", "num_virtual_tokens": 2}, {"name": "ia3"}],
]


def recipe_of(name: str, make_recipe: RecipeMaker, output: str) -> dict[str, Any]:
    recipe = make_recipe(output) | {"method": {"name": name, **FIELDS.get(name, {})}}
    recipe["train"] |= {"max_steps": 5, "save_every": 2}
    return recipe


@pytest.mark.parametrize("name", methods.names())
def test_a_run_of_every_method_resumes_exactly_and_is_found_again(name: str, make_recipe: RecipeMaker) -> None:
    whole = train(recipe_of(name, make_recipe, "whole"))
    with pytest.raises(Stopped):
        train(recipe_of(name, make_recipe, "pieces"), on_event=interrupt_at(3))
    torch.manual_seed(99)
    resumed = train(recipe_of(name, make_recipe, "pieces"), resume=True)
    assert_same_run(whole.directory, resumed.directory)
    found = find(resumed.directory)
    measured = evaluate_run(found)
    best = min(row["loss"] for row in losses(whole.directory) if row.get("eval"))
    assert measured.adapter["loss"] == pytest.approx(best, rel=1e-4)
    assert measured.adapter["loss"] != measured.base["loss"]
    model, tokenizer, _ = found.load()
    assert list(byway.adapters(model)) == ["default"]
    assert len(generate_text(model, tokenizer, ["w1 w2"], max_new_tokens=3, raw=True)) == 1


@pytest.mark.parametrize("several", SEVERAL, ids=lambda several: "-".join(method["name"] for method in several))
def test_several_methods_train_together_resume_exactly_and_are_found_again(several: list[dict[str, Any]], make_recipe: RecipeMaker) -> None:
    def recipe(output: str) -> dict[str, Any]:
        made = make_recipe(output) | {"method": several}
        made["train"] |= {"max_steps": 5, "save_every": 2}
        return made

    names = [method["name"] for method in several]
    whole = train(recipe("whole"))
    assert isinstance(whole.adapter, tuple)
    assert [adapter.name for adapter in whole.adapter] == names
    assert sorted(entry.name for entry in (whole.directory / "adapter").iterdir()) == sorted(names)
    with pytest.raises(Stopped):
        train(recipe("pieces"), on_event=interrupt_at(3))
    resumed = train(recipe("pieces"), resume=True)
    assert losses(resumed.directory) == losses(whole.directory)
    for one, two in zip(whole.adapter, resumed.adapter, strict=True):
        first, second = one.state_dict(), two.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    measured = evaluate_run(find(whole.directory))
    assert measured.adapter["loss"] == pytest.approx(min(r["loss"] for r in losses(whole.directory) if r.get("eval")), rel=1e-4)
