"""The frozen-trunk cache in a run: the same training without the trunk. The checkpoint decides at a resume."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import byway
from byway.errors import ConfigError, RunError
from byway.recipe.recipe import Recipe
from byway.train.reporting.events import Note, Planned
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses, text_rows, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")

TOP = {"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.2, "layers": "1-"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``cache: auto`` use a folder of the test, with small units."""
    monkeypatch.setenv("BYWAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("byway.engine.cache.units.UNIT_TOKENS", 64)  # several units, small as the data are
    return tmp_path / "cache" / "trunk"


@contextmanager
def counted(cls: type = LlamaDecoderLayer) -> Iterator[list[int]]:
    """Record the layer number whenever a layer of this class computes."""
    calls: list[int] = []
    plain = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attention = self.self_attn if cls is LlamaDecoderLayer else self.attention.self
        calls.append(attention.layer_idx)
        return plain(self, *args, **kwargs)

    cls.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield calls
    finally:
        cls.forward = plain  # pyright: ignore[reportAttributeAccessIssue]


def line_of(recipe: dict[str, Any], **options: Any) -> str:
    """The engine's part of the plan; nothing is run."""
    return prepare(Recipe.from_dict(recipe), note=lambda text: None, **options).plan.levers


def adapter_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_close_runs(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = losses(one), losses(other)
    assert len(a) == len(b) > 5
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=tolerance)
        assert x.get("grad_norm", 0.0) == pytest.approx(y.get("grad_norm", 0.0), rel=10 * tolerance)


@pytest.mark.parametrize("pack", ["on", "off"])
def test_a_run_from_the_cache_has_the_losses_of_the_live_run(make_recipe: RecipeMaker, tmp_path: Path, pack: str) -> None:
    live = byway.train(make_recipe("live", method=TOP, engine={"pack": pack}))
    cached = byway.train(make_recipe("cached", method=TOP, engine={"pack": pack, "cache": "auto"}))
    assert_close_runs(live.directory, cached.directory)


def test_the_trunk_runs_once_for_each_row_and_never_in_later_runs(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    with counted() as calls:
        byway.train(make_recipe("one", method=TOP, engine={"cache": "auto"}))
    assert 0 < calls.count(0) < calls.count(1)
    with counted() as calls:
        other = {**TOP, "rank": 2, "dropout": 0.0, "name": "dora"}
        later = byway.train(make_recipe("two", method=other, train={"learning_rate": 3e-3, "seed": 5}, engine={"cache": "auto"}))
    # what is left: the proof on the probe rows, the memory estimate, and one unit of each store that is computed again
    started = len(prepared_calls(make_recipe("three", method=other, train={"seed": 5}, engine={"cache": "auto"})))
    assert calls.count(0) == started + 2
    assert later.metrics["step"] == 6


def prepared_calls(recipe: dict[str, Any]) -> list[int]:
    with counted() as calls:
        prepare(Recipe.from_dict(recipe), note=lambda text: None)
    return [index for index in calls if index == 0]


@pytest.mark.parametrize("lost", ["nothing", "some", "everything"])
def test_interrupted_with_its_cache_deleted_and_resumed_is_bit_identical(make_recipe: RecipeMaker, own_cache: Path, lost: str) -> None:
    whole = byway.train(make_recipe("whole", method=TOP, engine={"cache": "auto"}, train={"save_every": 1}))
    shutil.rmtree(own_cache)
    recipe = make_recipe("cut", method=TOP, engine={"cache": "auto"}, train={"save_every": 1})
    with pytest.raises(KeyboardInterrupt):
        byway.train(recipe, on_event=interrupt_at(3))
    units = sorted(own_cache.glob("trunk-*/unit-*"))
    assert units
    for unit in {"nothing": [], "some": units[::2], "everything": units}[lost]:
        unit.unlink()
    resumed = byway.train(recipe, resume=True)
    assert_same_run(whole.directory, resumed.directory)
    assert adapter_hash(whole.directory) == adapter_hash(resumed.directory)


def test_a_cache_filled_by_another_run_changes_no_bit(make_recipe: RecipeMaker, own_cache: Path) -> None:
    first = byway.train(make_recipe("first", method=TOP, engine={"cache": "auto"}, train={"seed": 3}))
    assert first.metrics["step"] == 6
    warm = byway.train(make_recipe("warm", method=TOP, engine={"cache": "auto"}))
    shutil.rmtree(own_cache)
    cold = byway.train(make_recipe("cold", method=TOP, engine={"cache": "auto"}))
    assert_same_run(cold.directory, warm.directory)


def test_a_resume_refuses_to_go_on_live_and_follows_the_checkpoint(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe("run", method=TOP, engine={"cache": "auto"}, train={"save_every": 1})
    with pytest.raises(KeyboardInterrupt):
        byway.train(recipe, on_event=interrupt_at(2))
    for engine in ({}, {"cache": "auto", "cache_dtype": "bf16"}):
        with pytest.raises(ConfigError, match=r"engine\.cache: states were read from a cache in the checkpoint"):
            byway.train({**recipe, "engine": engine}, resume=True)
    # one step is less than an epoch, where auto would be off in a new run; and a directory's name may change
    short = {**recipe, "train": {**recipe["train"], "max_steps": 2}}
    assert "cache on" in line_of(short, resume=True)
    assert "cache off (the run is shorter than one epoch)" in line_of({**short, "output": recipe["output"] + "-new"})


def test_a_run_without_a_cache_stays_without_at_its_resume(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe("run", method=TOP, train={"save_every": 1})
    with pytest.raises(KeyboardInterrupt):
        byway.train(recipe, on_event=interrupt_at(2))
    assert "cache off (as in the checkpoint)" in line_of({**recipe, "engine": {"cache": "auto"}}, resume=True)
    with pytest.raises(ConfigError, match=r"states were computed in the checkpoint, read from a cache now"):
        byway.train({**recipe, "engine": {"cache": str(tmp_path / "here")}}, resume=True)


def test_the_plan_says_what_is_cached_and_how_much_that_takes(make_recipe: RecipeMaker, own_cache: Path) -> None:
    session = prepare(Recipe.from_dict(make_recipe("run", method=TOP, engine={"cache": "auto"})), note=lambda text: None)
    tokens = sum(map(session.task.length, [*session.rows.train, *session.rows.evaluation]))
    assert f"cache on (layer 1 of 2, 128 bytes a token, {tokens * 128 / 1e3:,.0f} kB)" in session.plan.levers
    assert not own_cache.exists()  # planning writes nothing


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "lora", "rank": 4, "targets": "all-linear"}, "the first of 2 layers is trained"),
        ({"name": "prompt_tuning", "num_virtual_tokens": 3}, "something that feeds the first layer is trained"),
    ],
)
def test_what_trains_below_runs_live_with_auto_and_is_refused_with_a_directory(
    make_recipe: RecipeMaker, tmp_path: Path, method: dict[str, Any], reason: str
) -> None:
    recipe = make_recipe("run")
    assert f"cache off ({reason})" in line_of({**recipe, "method": method, "engine": {"cache": "auto"}})
    with pytest.raises(ConfigError, match=reason):
        byway.train({**recipe, "method": method, "engine": {"cache": str(tmp_path / "here")}})
    assert not (tmp_path / "here").exists() and not (tmp_path / "run").exists()


def test_a_limit_that_is_too_small_is_said_before_work_starts(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe("run", method=TOP, engine={"cache": "auto", "cache_limit_gb": 1e-6})
    assert "cache off (it would take 0.0 GB; engine.cache_limit_gb is 1e-06)" in line_of(recipe)
    with pytest.raises(ConfigError, match=r"engine\.cache_limit_gb is 1e-06"):
        byway.train({**recipe, "engine": {**recipe["engine"], "cache": str(tmp_path / "here")}})


def test_a_directory_that_cannot_be_written_is_refused_before_work_starts(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        byway.train(make_recipe("run", method=TOP, engine={"cache": str(tmp_path / "file" / "deep")}))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_run_with_its_checkpoint_intact(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    recipe = make_recipe("run", method=TOP, engine={"cache": "auto"}, train={"save_every": 1, "rows_per_step": 1, "max_steps": 24})
    plain, written = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        if "unit-" in str(target):
            written[0] += 1
            if written[0] > 2:
                raise OSError(28, "No space left on device")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError, match=r"cannot write the cache .*No space left on device \(ENOSPC\)"):
        byway.train(recipe)
    monkeypatch.setattr(os, "replace", plain)
    assert byway.train(recipe, resume=True).metrics["step"] == 24


def test_a_damaged_store_is_noticed_at_the_start_and_made_again(make_recipe: RecipeMaker, own_cache: Path) -> None:
    whole = byway.train(make_recipe("whole", method=TOP, engine={"cache": "auto"}))
    for unit in own_cache.glob("trunk-*/unit-*"):
        data = bytearray(unit.read_bytes())
        data[-3] ^= 0x40
        unit.write_bytes(data)
    notes: list[str] = []
    again = byway.train(
        make_recipe("again", method=TOP, engine={"cache": "auto"}),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert any("its checksum is wrong" in text for text in notes)
    assert_same_run(whole.directory, again.directory)


def test_wrong_states_with_a_right_checksum_are_found_by_the_spot_check(make_recipe: RecipeMaker, own_cache: Path) -> None:
    from byway.engine.cache.store import DiskStore

    whole = byway.train(make_recipe("whole", method=TOP, engine={"cache": "auto"}))
    for path in own_cache.glob("trunk-*/unit-*"):
        store = DiskStore(path.parent, path.parent.name.removeprefix("trunk-"), lambda text: None)
        store.put(int(path.stem[-6:]), {name: tensor + 0.1 for name, tensor in load_file(path).items()})
    notes: list[str] = []
    again = byway.train(
        make_recipe("again", method=TOP, engine={"cache": "auto"}),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert sum("does not hold what the trunk computes now" in text for text in notes) == 2
    assert_same_run(whole.directory, again.directory)


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_an_approximation_shows_its_error_in_the_plan(make_recipe: RecipeMaker, tmp_path: Path, kept: str) -> None:
    import re

    plans: list[str] = []
    recipe = make_recipe("rough", method=TOP, engine={"cache": "auto", "cache_dtype": kept})
    rough = byway.train(recipe, on_event=lambda event: plans.append(event.plan.levers) if isinstance(event, Planned) else None)
    found = re.search(rf"as {kept}: states off by ([\d.]+)%, loss by [+-]", plans[0])
    assert found and 0 < float(found[1]) < 2
    live = byway.train(make_recipe("live", method=TOP))
    assert_close_runs(live.directory, rough.directory, tolerance=2e-2)


def test_a_ladder_is_trained_without_running_the_backbone(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    ladder = {"name": "ladder_side_tuning", "reduction": 4}
    recipe = make_recipe("live")
    live = byway.train({**recipe, "method": ladder})
    cached = byway.train({**recipe, "method": ladder, "output": str(tmp_path / "cached"), "engine": {"cache": "auto"}})
    assert_close_runs(live.directory, cached.directory)
    session = prepare(Recipe.from_dict({**recipe, "method": ladder, "output": "x", "engine": {"cache": "auto"}}), note=lambda text: None)
    assert "cache on (all 2 layers" in session.plan.levers
    assert "cache on (1 of 2 layers" in line_of({**recipe, "method": {**ladder, "drop": [1]}, "output": "x", "engine": {"cache": "auto"}})


def classifier_recipe(bert_dir: Path, folder: Path, output: str, method: dict[str, Any], **engine: Any) -> dict[str, Any]:
    rows = [{"text": row["text"], "label": "yes" if "w1" in row["text"].split() else "no"} for row in text_rows(24)]
    return {
        "base": {"model": str(bert_dir), "device": "cpu"},
        "method": method,
        "data": {"train": str(write_rows(folder / "labelled.jsonl", rows)), "task": "classification", "eval_fraction": 0.2},
        "train": {"epochs": 2, "learning_rate": 1e-2, "rows_per_step": 4, "threads": 1, "micro_batch_tokens": 64},
        "engine": engine,
        "output": str(folder / output),
    }


def test_of_a_classifier_only_what_the_head_reads_is_kept(bert_dir: Path, tmp_path: Path) -> None:
    head = {"name": "full", "targets": ["pooler.dense"]}
    recipe = classifier_recipe(bert_dir, tmp_path, "cached", head, cache="auto")
    plan = line_of(recipe)
    assert "cache on (above layer 2, first token only" in plan
    cached = byway.train(recipe)
    live = byway.train(classifier_recipe(bert_dir, tmp_path, "live", head))
    assert_close_runs(live.directory, cached.directory)
    with counted(BertLayer) as calls:
        byway.train(classifier_recipe(bert_dir, tmp_path, "again", head, cache="auto"))
    with counted(BertLayer) as started:
        prepare(Recipe.from_dict(classifier_recipe(bert_dir, tmp_path, "never", head, cache="auto")), note=lambda text: None)
    assert len(calls) <= len(started) + 2 * 2  # two layers, one unit of each store computed again


def test_upper_layers_of_an_encoder_train_from_the_cache(bert_dir: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 4, "targets": "all-linear", "layers": "1-"}
    cached = byway.train(classifier_recipe(bert_dir, tmp_path, "cached", method, cache="auto"))
    live = byway.train(classifier_recipe(bert_dir, tmp_path, "live", method))
    assert_close_runs(live.directory, cached.directory)


@pytest.mark.parametrize("word", ["on", "true", "None"])
def test_a_switch_is_no_directory(make_recipe: RecipeMaker, word: str) -> None:
    recipe = make_recipe("run", method=TOP)
    if word == "None":
        with pytest.raises(ConfigError, match="cache"):
            Recipe.from_dict({**recipe, "engine": {"cache": None}})
        return
    with pytest.raises(ConfigError, match=f"engine.cache is '{word}'; it must be off, auto or a directory"):
        Recipe.from_dict({**recipe, "engine": {"cache": word}})


def test_an_approximation_without_a_cache_is_a_contradiction(make_recipe: RecipeMaker) -> None:
    with pytest.raises(ConfigError, match=r"engine\.cache_dtype is int8, but engine\.cache is off"):
        Recipe.from_dict({**make_recipe("run"), "engine": {"cache_dtype": "int8"}})


def test_torch_is_left_as_it_was(make_recipe: RecipeMaker) -> None:
    state = torch.get_rng_state()
    byway.train(make_recipe("run", method=TOP, engine={"cache": "auto"}))
    assert torch.equal(state, torch.get_rng_state())
