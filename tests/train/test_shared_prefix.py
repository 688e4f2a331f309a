"""``engine.share_prefix`` in a run: the same losses with fewer tokens computed; the plan shows it, or why it is off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import byway
from byway.engine.shared_prefix import KEY
from byway.recipe.recipe import Recipe
from byway.train.loop import train
from byway.train.setup import Session, prepare
from tests.train.conftest import WORDS, RecipeMaker, interrupt_at, losses, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")

HEAD = " ".join(WORDS[:12])


def instructed(count: int, seed: int = 0, head: str = HEAD) -> list[dict[str, str]]:
    """Prompts that begin with the same words, and completions."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"{head} {' '.join(draw.choices(WORDS, k=draw.randint(1, 4)))}",
            "completion": f" {draw.choice(WORDS)} {draw.choice(WORDS)}",
        }
        for _ in range(count)
    ]


@pytest.fixture
def recipe_of(make_recipe: RecipeMaker, tmp_path: Path) -> Any:
    def make(output: str, wish: str = "auto", rows: list[dict[str, str]] | None = None, **sections: Any) -> dict[str, Any]:
        train = write_rows(tmp_path / f"{output}.jsonl", instructed(24) if rows is None else rows)
        held_out = write_rows(tmp_path / "held_out.jsonl", instructed(6, seed=1))
        engine = {"share_prefix": wish} | sections.pop("engine", {})
        data = {"train": str(train), "eval": str(held_out)}
        return make_recipe(output, data=data, engine=engine, method={"dropout": 0.0}, **sections)

    return make


def session(recipe: dict[str, Any]) -> Session:
    return prepare(Recipe.from_dict(recipe), note=lambda text: None)


def test_shared_and_plain_runs_have_the_same_losses(recipe_of: Any, tmp_path: Path) -> None:
    for output, wish in (("shared", "auto"), ("plain", "off")):
        train(recipe_of(output, wish))
    shared, plain = losses(tmp_path / "shared"), losses(tmp_path / "plain")
    assert len(shared) == len(plain) == 8
    for one, other in zip(shared, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        # the rows' own tokens, whatever of them was computed
        assert {key: one.get(key) for key in ("step", "tokens", "labels")} == {key: other.get(key) for key in ("step", "tokens", "labels")}


def test_the_plan_says_how_much_it_saves_and_batches_hold_what_is_computed(recipe_of: Any) -> None:
    found = session(recipe_of("on", "on"))
    assert "share_prefix on (12 tokens, " in found.plan.levers or "share_prefix on (13 tokens, " in found.plan.levers
    micros = [micro for step in found.order.epoch(0) for micro in step]
    sizes = []
    for micro in micros:
        batch = found.engaged.batch(found.task, [found.rows.train[i] for i in micro], found.device)
        sizes.append(batch["input_ids"].shape[1])
        assert sizes[-1] == found.order.sharing.tokens(micro) <= 64
        assert KEY in batch or len(micro) == 1
    whole = session(recipe_of("off", "off"))
    assert sum(sizes) < 0.6 * sum(whole.order.lengths)
    assert len(micros) < sum(len(step) for step in whole.order.epoch(0))
    assert [sorted(i for m in step for i in m) for step in found.order.epoch(0)] == [
        sorted(i for m in step for i in m) for step in whole.order.epoch(0)
    ]
    assert "share_prefix off (switched off)" in whole.plan.levers


def test_rows_with_nothing_in_common_are_left_alone_and_on_is_refused(recipe_of: Any) -> None:
    rows = [{"prompt": WORDS[n], "completion": f" {WORDS[n + 1]}" * (1 + n % 3)} for n in range(24)]
    assert "share_prefix off (no two rows share a prefix of at least 8 tokens" in session(recipe_of("auto", "auto", rows)).plan.levers
    with pytest.raises(byway.ConfigError, match=r"engine\.share_prefix is on, but no two rows share a prefix"):
        session(recipe_of("on", "on", rows))


def test_a_little_in_common_is_not_worth_it_unless_it_is_asked_for(recipe_of: Any) -> None:
    draw = random.Random(3)
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=40)), "completion": f" {WORDS[n]}"} for n in range(40)] + instructed(2)
    few = {"train": {"rows_per_step": 42, "micro_batch_tokens": 4096}}
    assert "fewer tokens is not worth it" in session(recipe_of("auto", "auto", rows, **few)).plan.levers
    assert "share_prefix on (" in session(recipe_of("on", "on", rows, **few)).plan.levers


def test_without_packing_nothing_is_shared(recipe_of: Any) -> None:
    assert "share_prefix off (rows are not packed)" in session(recipe_of("padded", "auto", engine={"pack": "off"})).plan.levers
    with pytest.raises(byway.ConfigError, match="rows are not packed"):
        session(recipe_of("refused", "on", engine={"pack": "off"}))


def test_rows_of_one_length_are_packed_when_sharing_is_asked_for(recipe_of: Any) -> None:
    rows = [{"prompt": f"{HEAD} {WORDS[n]}", "completion": f" {WORDS[n + 1]}"} for n in range(24)]
    assert "pack off (all rows have the same length" in session(recipe_of("auto", "auto", rows)).plan.levers
    assert "share_prefix on (" in session(recipe_of("on", "on", rows)).plan.levers


def test_states_from_the_cache_are_shared_too(recipe_of: Any, tmp_path: Path) -> None:
    for output, engine in (("cached", {"cache": str(tmp_path / "states")}), ("live", {})):
        recipe = recipe_of(output, "on", engine=engine)
        recipe["method"] = {"name": "lora", "rank": 4, "targets": "all-linear", "layers": "1-", "dropout": 0.0}
        levers = session(recipe).plan.levers
        assert "share_prefix on (" in levers and ("cache on (" in levers) == (output == "cached")
        train(recipe)
    for one, other in zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_what_does_not_reproduce_the_plain_loss_is_switched_off(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from byway.engine import shared_prefix
    from byway.train.levers import share_prefix as sharing

    def forgetful(batch: dict[str, Any]) -> dict[str, Any]:
        found = shared_prefix.share(batch)
        return {**found, KEY: ((),) * len(found[KEY])}

    monkeypatch.setattr(sharing, "share", forgetful)
    assert "share_prefix off (it does not reproduce the plain loss" in session(recipe_of("wrong")).plan.levers


def test_an_interrupted_run_resumes_bit_for_bit(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("whole")
    train(recipe)
    again = {**recipe, "output": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        train(again, on_event=interrupt_at(2))
    train(again, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
