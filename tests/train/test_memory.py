"""Memory is predicted before a run; recompute and smaller micro-batches only as needed; a resume keeps the choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import byway
from byway.recipe.recipe import Recipe
from byway.train import setup, train
from byway.train.levers.checkpointing import layers_of
from byway.train.plan import memory as memory_module
from byway.train.plan.machine import group_bytes
from byway.train.plan.memory import Choice, measured, recorded
from byway.train.reporting.events import Event, Planned
from byway.train.setup import Session, prepare
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at

pytestmark = pytest.mark.usefixtures("quick_picture")

MB = 2**20


def session(recipe: dict[str, Any]) -> Session:
    return prepare(Recipe.from_dict(recipe), note=lambda text: None)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that the process uses nothing and has this many bytes, so that tiny activations matter."""

    def have(free: int) -> None:
        monkeypatch.setattr(memory_module, "held_bytes", lambda *_: 0)
        monkeypatch.setattr(memory_module, "high_water_bytes", lambda *_: 0)
        monkeypatch.setattr(memory_module, "available_bytes", lambda *_: free)
        monkeypatch.setattr(memory_module, "MEGABYTE", 1)

    return have


ENGINE = {"recompute": "off"}
METHOD = {"dropout": 0.0}
TRAIN = {"micro_batch_tokens": "auto", "rows_per_step": 24}


def need(recipe: dict[str, Any], budget: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, **engine: Any) -> int:
    budget(10**15)
    return session({**recipe, "engine": {**recipe.get("engine", {}), **engine}}).plan.memory_mb


def test_checkpointing_on_as_few_layers_as_the_budget_asks_for(
    make_recipe: RecipeMaker, budget: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(method=METHOD, train=TRAIN, engine=ENGINE)
    none = need(recipe, budget, monkeypatch, checkpointing="off")
    every = need(recipe, budget, monkeypatch, checkpointing="on")
    assert every < none
    layers = ("model.layers.0", "model.layers.1")
    seen = []
    for limit in (none, (none + every) // 2, every):
        budget(int(limit / 0.9) + 2)
        ready = session(recipe)
        assert ready.plan.memory_mb <= limit
        assert not ready.plan.memory_note
        assert ready.order.micro_tokens == 2048
        seen.append(layers_of(ready.engaged))
        assert ready.essentials["memory"] == {"layers": list(seen[-1]), "micro_tokens": 2048, "recompute": False}
    assert seen[0] == ()
    assert seen[2] == layers
    assert seen[1] in (layers[:1], layers), "the lower layers come first"
    assert "checkpointing on (2 layers; without it about" in ready.plan.levers


def test_cheap_activations_are_computed_again_only_where_memory_asks_for_it_and_before_any_layer_is(
    make_recipe: RecipeMaker, budget: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "SMALLEST", 64)
    recipe = make_recipe(method=METHOD, train=TRAIN)
    off, on = (need(recipe, budget, monkeypatch, recompute=wish) for wish in ("off", "on"))
    assert on < off
    for limit, again in ((off, False), ((off + on) // 2, True)):
        budget(int(limit / 0.9) + 2)
        ready = session(recipe)
        assert ready.engaged.has("recompute") == again
        assert layers_of(ready.engaged) == ()
        assert ready.essentials["memory"]["recompute"] == again
        assert ("recompute on," if again else "recompute off (not needed),") in ready.plan.levers
    budget(10**15)
    assert "recompute on," in session({**recipe, "engine": {"recompute": "on"}}).plan.levers


def test_where_that_is_not_enough_steps_are_cut_smaller_and_else_it_is_said(
    make_recipe: RecipeMaker, budget: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(method=METHOD, train=TRAIN, engine=ENGINE)
    every = need(recipe, budget, monkeypatch, checkpointing="on")
    budget(int(0.8 * every / 0.9))
    ready = session(recipe)
    assert ready.order.micro_tokens < 2048
    assert len(layers_of(ready.engaged)) == 2
    assert not ready.plan.memory_note
    assert [sorted(i for micro in step for i in micro) for step in ready.order.epoch(0)] == [list(range(24))]
    ready = session(make_recipe(method=METHOD, train={**TRAIN, "micro_batch_tokens": 1024}, engine=ENGINE))
    assert ready.order.micro_tokens == 1024, "what the recipe says is not changed"
    assert "more than the" in ready.plan.memory_note
    assert "it may not fit" in ready.plan.parts()["memory"]
    budget(10)
    ready = session(make_recipe(method=METHOD, train=TRAIN, engine={**ENGINE, "checkpointing": "off"}))
    assert ready.plan.memory_note
    assert not layers_of(ready.engaged)
    assert "checkpointing off (switched off)" in ready.plan.levers


def test_the_budget_of_the_recipe_counts_before_the_machine(make_recipe: RecipeMaker) -> None:
    ready = session(make_recipe(engine={"memory_mb": 1}))
    assert "more than engine.memory_mb: 1" in ready.plan.memory_note
    assert layers_of(ready.engaged) == ("model.layers.0", "model.layers.1")
    assert not layers_of(session(make_recipe(engine={"memory_mb": 1_000_000})).engaged)


def test_layers_that_cannot_be_run_again_are_kept(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        model, tokenizer = byway.load_base(*args, **options)
        model.get_submodule("model.layers.1.input_layernorm").register_forward_pre_hook(lambda module, given: (given[0].mul_(1.1),))
        return model, tokenizer

    monkeypatch.setattr(setup, "load_base", load)
    ready = session(make_recipe(engine={"memory_mb": 1}))
    assert "checkpointing off (the model does not run with it (RuntimeError: one of the variables" in ready.plan.levers
    with pytest.raises(byway.ConfigError, match=r"engine\.checkpointing is on, but the model does not run with it"):
        session(make_recipe(engine={"checkpointing": "on"}))


def test_a_resume_takes_the_recorded_choice_and_is_the_same_run(
    make_recipe: RecipeMaker, budget: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if there is now more memory than before, or less."""
    settings: dict[str, Any] = {"train": {**TRAIN, "epochs": 4}, "engine": ENGINE}
    every = need(make_recipe(**settings), budget, monkeypatch, checkpointing="on")
    budget(int(0.8 * every / 0.9))
    whole = train(make_recipe("whole", **settings))
    recipe = make_recipe("pieces", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_event=interrupt_at(2))
    plans: list[Any] = []

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            plans.append(event.plan)

    budget(10**15)
    resumed = train(recipe, resume=True, on_event=watch)
    assert "checkpointing on (2 layers; as in the checkpoint)" in plans[0].levers
    assert plans[0].micro_tokens < 2048
    assert_same_run(whole.directory, resumed.directory)


def test_a_recorded_choice_is_made_anew_where_the_recipe_asks_for_something_else() -> None:
    asked = {"engine.checkpointing": "auto", "engine.memory_mb": None, "train.micro_batch_tokens": "auto"}
    saved = {"recipe": asked, "memory": {"layers": ["a"], "micro_tokens": 256, "recompute": True}}
    assert recorded(saved, asked) == Choice(("a",), 256, True)
    assert recorded(saved, asked | {"train.seed": 3}) == Choice(("a",), 256, True)
    assert recorded(saved, asked | {"engine.checkpointing": "off"}) is None
    assert recorded(saved, asked | {"engine.memory_mb": 4000}) is None
    assert recorded(saved, asked | {"engine.recompute": "off"}) is None
    assert recorded({"recipe": asked, "memory": {}}, asked) is None
    assert Choice(("a",), 256, True).to_dict() == {"layers": ["a"], "micro_tokens": 256, "recompute": True}


def test_checkpointing_on_where_nothing_is_kept_is_refused(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe(engine={"checkpointing": "on"})
    recipe["method"] = {"name": "ladder_side_tuning", "reduction": 4}
    with pytest.raises(byway.ConfigError, match="no layer keeps activations"):
        session(recipe)


def test_measuring_leaves_no_trace(make_recipe: RecipeMaker) -> None:
    ready = session(make_recipe())
    model = ready.model
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    batch = ready.engaged.batch(ready.task, ready.rows.train[:3], ready.device)
    first = measured(model, ready.task, ready.engaged, batch)
    assert measured(model, ready.task, ready.engaged, batch) == first, "bytes are counted, not sampled"
    assert first.forward > 0
    assert first.backward > 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", [{}, {"pack": "off"}, {"labels_only": "off"}, {"checkpointing": "on"}])
def test_what_small_batches_tell_about_a_large_one_is_right(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    """The largest micro-batch: the prediction from a few rows against its own measurement."""
    ready = session(
        make_recipe(rows=40, train={"micro_batch_tokens": 700, "rows_per_step": 40}, engine=ENGINE | engine)
    )  # tiny tensors are kept, not recomputed
    monkeypatch.setattr(memory_module, "EXACT", 128)
    planner = memory_module._Planner(ready.recipe, ready.model, ready.task, ready.rows.train, ready.engaged, lambda micro: ready.order)
    shapes = planner.shapes(ready.order)
    assert max(shape.cells for shape in shapes) > memory_module.EXACT
    predicted = planner.model_of(ready.engaged, ready.order).most(shapes)
    micros = [[ready.rows.train[i] for i in micro] for micro in ready.order.epoch(0)[0]]
    most = 0
    for micro in micros:
        found = measured(ready.model, ready.task, ready.engaged, ready.engaged.batch(ready.task, micro, ready.device))
        most = max(most, found.forward, found.kept + found.loss, found.backward)
    assert predicted == pytest.approx(most, rel=0.1)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def test_the_limit_of_a_container_is_seen_in_both_versions_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    two = tmp_path / "two"
    write(own, "0::/box/inner\n")
    write(two / "memory.max", "max\n")
    write(two / "memory.current", "1\n")
    write(two / "box/memory.max", f"{1000 * MB}\n")
    write(two / "box/memory.current", f"{400 * MB}\n")
    write(two / "box/memory.stat", f"anon 5\ninactive_file {100 * MB}\n")
    write(two / "box/inner/memory.max", "max\n")
    write(two / "box/inner/memory.current", "7\n")
    assert group_bytes(two, own) == 700 * MB
    one = tmp_path / "one"
    write(own, "5:cpu:/x\n4:memory:/gone\n0::/\n")
    write(one / "memory/memory.limit_in_bytes", f"{500 * MB}\n")
    write(one / "memory/memory.usage_in_bytes", f"{200 * MB}\n")
    assert group_bytes(one, own) == 300 * MB
    write(one / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert group_bytes(one, own) is None
    assert group_bytes(one, tmp_path / "nothing") is None
