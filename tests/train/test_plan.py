"""The length of a run in the plan line."""

from __future__ import annotations

import pytest

from byway.recipe.recipe import Recipe
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker


@pytest.mark.parametrize(("epochs", "said"), [(1, "1 epoch,"), (3, "3 epochs,")])
def test_steps_epochs_and_warm_up_are_said(make_recipe: RecipeMaker, epochs: int, said: str) -> None:
    plan = prepare(Recipe.from_dict(make_recipe(train={"epochs": epochs})), note=print).plan
    assert plan.parts()["steps"] == f"{epochs * plan.steps_per_epoch} steps ({said} {plan.warmup} warm-up)"
    assert plan.steps_per_epoch > 1
