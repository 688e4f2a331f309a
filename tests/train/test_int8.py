"""A base multiplied in 8 bits: the plan shows its error; resume, evaluation and merging work as for any base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import byway
from byway.base.arithmetic import int8
from byway.base.arithmetic.int8 import in_int8
from byway.base.arithmetic.integers import multiplies_int8
from byway.errors import ConfigError
from byway.inference.evaluate import evaluate_run
from byway.inference.runs import find
from byway.recipe.recipe import Recipe
from byway.train import Stopped, setup, train
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses, tree

pytestmark = pytest.mark.usefixtures("quick_picture")
INT8 = {"compute": "int8"}


@pytest.mark.parametrize("instructions", [True, False])
def test_the_plan_says_that_it_is_approximate_how_far_off_and_when_it_is_slow(
    make_recipe: RecipeMaker, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "multiplies_int8", lambda kind: instructions)
    session = prepare(Recipe.from_dict(make_recipe(base=INT8)), note=print)
    parts = session.plan.parts()
    assert "(float32, int8 products, cpu)" in parts["base"]
    assert "int8 products: approximate (loss " in parts["engine"] and "gradients " in parts["engine"]
    assert ("no gain here: this CPU has no 8-bit dot products" in parts["engine"]) is not instructions
    assert session.engaged.packed and session.engaged.labels_only and session.engaged.has("frontier")
    assert session.essentials["recipe"]["base.compute"] == "int8"


def test_auto_never_chooses_it(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "multiplies_int8", lambda kind: True)
    for base in ({}, {"dtype": "bf16"}):
        session = prepare(Recipe.from_dict(make_recipe(base=base)), note=print)
        assert not in_int8(session.model) and "int8" not in str(session.plan.parts())


def test_a_gpu_is_never_slow() -> None:
    assert multiplies_int8("cuda")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_learns_nearly_as_the_plain_base_does(make_recipe: RecipeMaker, dtype: str) -> None:
    own = train(make_recipe("own", base={**INT8, "dtype": dtype}))
    plain = train(make_recipe("plain", base={"dtype": dtype, "compute": "same"}))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(losses(own.directory), losses(plain.directory), strict=True)]
    assert any(a != b for a, b in pairs)
    assert all(abs(a - b) < 0.02 * b for a, b in pairs)


def test_interrupted_and_resumed_equals_uninterrupted(make_recipe: RecipeMaker) -> None:
    whole = train(make_recipe("whole", base=INT8))
    recipe = make_recipe("pieces", base=INT8)
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(2))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


@pytest.mark.parametrize(("before", "after"), [("int8", "same"), ("same", "int8")])
def test_a_run_is_not_resumed_with_other_products(make_recipe: RecipeMaker, before: str, after: str) -> None:
    with pytest.raises(Stopped):
        train(make_recipe(base={"compute": before}), on_event=interrupt_at(2))
    with pytest.raises(ConfigError, match=f'base.compute: "{before}" in the checkpoint, "{after}" now'):
        train(make_recipe(base={"compute": after}), resume=True)


def test_a_run_is_measured_as_it_was_trained(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(base=INT8))
    found = find(run.directory)
    assert in_int8(found.load()[0])
    assert evaluate_run(found).adapter["loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-4)


def test_the_adapter_merges_into_the_plain_base(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    run = train(make_recipe(base=INT8))
    assert not isinstance(run.adapter, tuple)
    plain, _ = byway.load_base(llama_dir)
    byway.load(plain, run.directory / "adapter")
    byway.merge(plain)
    byway.merge(run.model)
    own, expected = run.model.state_dict(), plain.state_dict()
    assert list(own) == list(expected) and all(torch.equal(own[k], expected[k]) for k in own)
    base = load_file(llama_dir / "model.safetensors")
    assert not torch.equal(own["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_the_base_is_bit_identical_after_training(make_recipe: RecipeMaker, llama_dir: Path) -> None:
    run = train(make_recipe(base=INT8))
    base = load_file(llama_dir / "model.safetensors")
    own = byway.base_state_dict(run.model)
    assert all(torch.equal(own[name], tensor) for name, tensor in base.items())


def test_a_cache_holds_the_states_of_its_own_products(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    method, engine = {"layers": "1", "dropout": 0.0}, {"cache": str(tmp_path / "cache")}
    live = train(make_recipe("live", base=INT8, method=method))
    cached = train(make_recipe("cached", base=INT8, method=method, engine=engine))
    stores = set(tree(tmp_path / "cache"))
    plain = train(make_recipe("plain", method=method, engine=engine))
    assert stores < set(tree(tmp_path / "cache"))  # another store: these states do not fit plain products
    for own, twin in zip(losses(cached.directory), losses(live.directory), strict=True):
        assert own["loss"] == pytest.approx(twin["loss"], rel=1e-3)
    again = train(make_recipe("again", method=method))
    for own, twin in zip(losses(plain.directory), losses(again.directory), strict=True):
        assert own["loss"] == pytest.approx(twin["loss"], rel=1e-5)


def test_an_error_that_is_too_large_ends_the_run_before_anything_is_written(
    make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_LARGEST_ERROR", 1e-7)
    recipe = make_recipe(base=INT8)
    with pytest.raises(ConfigError, match=r"base\.compute is int8, but its loss is"):
        train(recipe)
    assert not Path(recipe["output"]).exists()


def test_a_quantized_base_is_refused_by_the_recipe_and_by_load_base(make_recipe: RecipeMaker, llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"base\.compute int8 and base\.quantize nf4 do not go together"):
        Recipe.from_dict(make_recipe(base={**INT8, "quantize": "nf4"}))
    with pytest.raises(ConfigError, match="compute 'int8' and quantize 'int8' exclude each other"):
        byway.load_base(llama_dir, quantize="int8", compute="int8")
    with pytest.raises(ConfigError, match="float64"):
        byway.load_base(llama_dir, torch.float64, compute="int8")


def test_load_base_names_the_maps_that_stay_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import tiny

    tiny.llama(intermediate_size=60).save_pretrained(tmp_path)
    capsys.readouterr()
    model, _ = byway.load_base(tmp_path, compute="int8")
    assert in_int8(model)
    assert "not multiplied in int8, as their sizes are not multiples of 8: model.layers.0.mlp.down_proj" in capsys.readouterr().err
