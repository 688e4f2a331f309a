"""DoRA, AdaLoRA, weight chains and LoRA initializations in byway.train: they learn, resume exactly and load again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import byway
from byway.methods.lowrank.adaptive import AdaptiveRank
from byway.methods.lowrank.sides import LowRank
from byway.train import Stopped, train
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses

pytestmark = pytest.mark.usefixtures("quick_picture")
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"name": "dora", "rank": 2, "targets": ["q_proj"], "dropout": 0.1},
    "adalora": {"name": "adalora", "rank": 1, "initial_rank": 3, "targets": ["q_proj", "v_proj"], "initial_steps": 1, "final_steps": 1},
    "weight_chain": {"name": "weight_chain", "targets": ["q_proj"], "links": [{"name": "low_rank", "rank": 2}, "magnitude"]},
    "eva": {"name": "lora", "rank": 3, "targets": ["q_proj", "down_proj"], "init": "eva"},
    "olora": {"name": "lora", "rank": 3, "targets": ["q_proj"], "init": "olora"},
}


def recipe_of(which: str, make_recipe: RecipeMaker, output: str) -> dict[str, Any]:
    return make_recipe(output) | {"method": METHODS[which]}


@pytest.mark.parametrize("which", METHODS)
def test_a_run_learns_and_goes_on_exactly_where_it_was_stopped(which: str, make_recipe: RecipeMaker) -> None:
    whole = train(recipe_of(which, make_recipe, "whole"))
    rows = [row["loss"] for row in losses(whole.directory) if not row.get("eval")]
    assert rows[-1] < rows[0]
    with pytest.raises(Stopped):
        train(recipe_of(which, make_recipe, "pieces"), on_event=interrupt_at(3))
    torch.manual_seed(99)
    resumed = train(recipe_of(which, make_recipe, "pieces"), resume=True)
    assert_same_run(whole.directory, resumed.directory)
    base, _ = byway.load_base(recipe_of(which, make_recipe, "other")["base"]["model"])
    again = byway.load(base, whole.directory / "adapter")
    assert again.num_parameters > 0


def test_adalora_ends_with_its_budget_in_a_run(make_recipe: RecipeMaker) -> None:
    run = train(recipe_of("adalora", make_recipe, "run"))
    (adapter,) = byway.adapters(run.model).values()
    sides = [side for _, side in adapter.side_paths() if isinstance(side, AdaptiveRank)]
    assert sum(int(side.living().sum()) for side in sides) == len(sides)
    assert all(int(side.progress[1]) == run.metrics["step"] for side in sides)


def test_eva_sees_real_rows_of_the_recipe(make_recipe: RecipeMaker) -> None:
    run = train(recipe_of("eva", make_recipe, "run"))
    (adapter,) = byway.adapters(run.model).values()
    assert sum(side.rank for _, side in adapter.side_paths() if isinstance(side, LowRank)) == 3 * 4
