"""A run that computes the last layer only where it is read equals one that computes it everywhere."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import byway
from byway.engine.last_layer import PositionsRead
from byway.tasks.classification import Classification
from byway.train import Stopped, train
from byway.train.reporting.events import Event, Planned
from tests import zoo
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, write_rows
from tests.train.test_packing import assert_same_numbers, recipe_for, still_bert

__all__ = ["still_bert"]

pytestmark = pytest.mark.usefixtures("quick_picture")

TOP = {"name": "lora", "rank": 4, "targets": "all-linear", "layers": [1]}


def trained(recipe: dict[str, Any]) -> tuple[Path, str]:
    """(directory, plan line)."""
    plans: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            plans.append(event.plan.levers)

    return train(recipe, on_event=watch).directory, plans[0]


@pytest.mark.parametrize("pack", ["on", "off"])
@pytest.mark.parametrize("cache", ["off", "states"])
def test_a_classifier_learns_the_same(still_bert: Path, tmp_path: Path, pack: str, cache: str) -> None:
    runs = []
    for wish in ("auto", "off"):
        engine = {"pack": pack, "last_layer": wish, "cache": cache if cache == "off" else str(tmp_path / cache)}
        runs.append(trained(recipe_for(still_bert, tmp_path, wish, engine=engine) | {"method": TOP}))
    assert_same_numbers([directory for directory, _ in runs])
    assert "last_layer on (at the first token, " in runs[0][1]
    assert "last_layer off (switched off)" in runs[1][1]


def test_a_resume_is_the_same_in_bits(bert_dir: Path, tmp_path: Path) -> None:
    """With dropout, a resume repeats the random draws."""
    keys: dict[str, Any] = {"train": {"save_every": 2}, "engine": {"last_layer": "on"}}
    whole = train(recipe_for(bert_dir, tmp_path, "whole", **keys))
    with pytest.raises(Stopped):
        train(recipe_for(bert_dir, tmp_path, "pieces", **keys), on_event=interrupt_at(3))
    resumed = train(recipe_for(bert_dir, tmp_path, "pieces", **keys), resume=True)
    assert_same_run(whole.directory, resumed.directory)


@pytest.mark.parametrize("pack", ["on", "off"])
def test_a_language_model_learns_the_same(make_recipe: RecipeMaker, pack: str) -> None:
    runs = []
    for wish in ("on", "off"):
        recipe = make_recipe(f"{pack}-{wish}", method={"dropout": 0.0}, engine={"pack": pack, "last_layer": wish})
        runs.append(trained(recipe))
    assert_same_numbers([directory for directory, _ in runs])
    assert "last_layer on (at tokens that predict one in the loss, " in runs[0][1]


@pytest.fixture
def pooling_bert(bert_dir: Path, tmp_path: Path) -> Path:
    """A tiny ModernBERT whose head reads the mean of all tokens."""
    directory = tmp_path / "modernbert"
    config = zoo.config("modernbert")
    config.classifier_pooling = "mean"
    config.vocab_size = json.loads((bert_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(0)
    transformers.ModernBertForSequenceClassification(config).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(bert_dir).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_that_reads_every_token_keeps_its_layer(pooling_bert: Path, tmp_path: Path, dtype: str) -> None:
    """In bf16 no tolerance of the loss could tell the difference."""

    def recipe(output: str, wish: str) -> dict[str, Any]:
        made = recipe_for(pooling_bert, tmp_path, output, engine={"last_layer": wish})
        return made | {"base": made["base"] | {"dtype": dtype, "compute": "same"}}

    _, plan = trained(recipe("mean", "auto"))
    assert re.search(r"last_layer off \(\d+ of \d+ positions are read besides the last token\)", plan)
    with pytest.raises(byway.ConfigError, match=r"engine\.last_layer is on, but \d+ of \d+ positions are read"):
        train(recipe("insisted", "on"))


def test_virtual_tokens_in_rows_keep_it(still_bert: Path, tmp_path: Path) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 2}
    _, plan = trained(recipe_for(still_bert, tmp_path, "prompt") | {"method": method})
    assert "last_layer off (the virtual tokens of default are inside the rows)" in plan


def test_what_saves_little_is_left_alone(still_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("byway.train.levers.last_layer").LastLayer, "worth", 0.6)
    everywhere = {"method": {"name": "lora", "rank": 4, "targets": "all-linear"}}
    _, plan = trained(recipe_for(still_bert, tmp_path, "all") | everywhere)
    assert re.search(r"last_layer off \(4\d\.\d% of the layers' work is not worth it\)", plan)
    engine = {"cache": str(tmp_path / "states")}
    _, cached = trained(recipe_for(still_bert, tmp_path, "cached", engine=engine) | {"method": TOP})
    assert re.search(r"last_layer on \(at the first token, 8\d\.\d% of the layers' work\)", cached)  # only the top layer is run


def test_the_proof_acts_on_rows_that_are_nearly_all_learned(
    make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check sees pieces around the first label; they may be read almost everywhere while other rows are not."""
    acted: list[int] = []
    true_rows = PositionsRead.gather

    def counted(self: PositionsRead, value: torch.Tensor) -> torch.Tensor:
        acted.append(len(self.index))
        return true_rows(self, value)

    monkeypatch.setattr(PositionsRead, "gather", counted)
    rows = [{"prompt": "a ", "completion": "b c d e " * (8 + i)} for i in range(8)]
    data = {"train": str(write_rows(tmp_path / "late.jsonl", rows)), "task": "text"}
    with pytest.raises(_Enough):
        train(make_recipe("late", data=data, engine={"last_layer": "on"}), on_event=stop_at_the_plan)
    assert acted


class _Enough(Exception):
    pass


def stop_at_the_plan(event: Event) -> None:
    if isinstance(event, Planned):
        raise _Enough


def test_evaluations_use_it_too(still_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    true_reading = Classification.reading

    def counted(self: Any, *args: Any) -> dict[str, Any]:
        seen.append(torch.is_grad_enabled())
        return true_reading(self, *args)

    monkeypatch.setattr(Classification, "reading", counted)
    trained(recipe_for(still_bert, tmp_path, "counted"))
    assert True in seen
    assert False in seen


def test_deciding_draws_nothing(still_bert: Path, bert_dir: Path, tmp_path: Path) -> None:
    """With dropout, a run that keeps its last layer whole draws the same as one in which nothing is tried."""
    runs = []
    for wish in ("off", "auto"):
        with pytest.MonkeyPatch.context() as patch:
            if wish == "auto":
                patch.setattr(import_module("byway.train.levers.last_layer"), "positions_read", lambda task, examples: [("last token", 1)])
            runs.append(trained(recipe_for(bert_dir, tmp_path, wish, engine={"last_layer": wish}))[0])
    assert_same_run(*runs)
