"""A base kept in bfloat16 and multiplied in float32: shown in the plan, learns as a float32 base, resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from byway.base.arithmetic import float32 as compute
from byway.core.weights import widened
from byway.inference.evaluate import evaluate_run
from byway.inference.runs import find
from byway.recipe.recipe import Recipe
from byway.train import Stopped, train
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses

pytestmark = pytest.mark.usefixtures("quick_picture")
KEPT = {"dtype": "bf16", "compute": "fp32"}


def test_the_plan_says_how_it_is_multiplied_and_levers_are_held_to_float32(make_recipe: RecipeMaker) -> None:
    session = prepare(Recipe.from_dict(make_recipe(base=KEPT)), note=print)
    assert "(bfloat16, computed in float32, cpu)" in session.plan.parts()["base"]
    assert session.engaged.packed and session.engaged.labels_only


@pytest.mark.parametrize("instructions", [True, False])
def test_auto_is_settled_by_the_processor_and_recorded(
    make_recipe: RecipeMaker, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "multiplies_bf16", lambda: instructions)
    session = prepare(Recipe.from_dict(make_recipe(base={"dtype": "bf16"})), note=print)
    assert widened(session.model) is not instructions
    assert session.essentials["recipe"]["base.compute"] == ("same" if instructions else "fp32")


def test_it_learns_as_a_float32_base_of_the_same_numbers_does(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    from byway.base import load_base

    rounded, tokenizer = load_base(llama_dir, "bf16")
    rounded.float().save_pretrained(tmp_path / "rounded")
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "rounded")
    own = train(make_recipe("own", base=KEPT))
    twin = train(make_recipe("twin", base={"model": str(tmp_path / "rounded"), "dtype": "fp32"}))
    pairs = zip(losses(own.directory), losses(twin.directory), strict=True)
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 * b["loss"] for a, b in pairs)


def test_interrupted_and_resumed_equals_uninterrupted(make_recipe: RecipeMaker) -> None:
    whole = train(make_recipe("whole", base=KEPT))
    recipe = make_recipe("pieces", base=KEPT)
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(2))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


def test_a_run_is_measured_as_it_was_trained(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(base=KEPT))
    found = find(run.directory)
    assert widened(found.load()[0])
    assert evaluate_run(found).adapter["loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
