"""A run whose last layer is computed where it is read is the run in which it is computed everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import byway
from byway.train import Stopped, train
from byway.train.events import Event, Planned
from tests import zoo
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at
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
    """With dropout: what is drawn is drawn again."""
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
    assert "last_layer on (at learned tokens, " in runs[0][1]


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


def test_a_head_that_reads_every_token_keeps_its_layer(pooling_bert: Path, tmp_path: Path) -> None:
    _, plan = trained(recipe_for(pooling_bert, tmp_path, "mean"))
    assert "last_layer off (it does not reproduce the plain loss here" in plan
    with pytest.raises(byway.ConfigError, match=r"engine\.last_layer is on, but it does not reproduce"):
        train(recipe_for(pooling_bert, tmp_path, "insisted", engine={"last_layer": "on"}))


def test_virtual_tokens_in_rows_keep_it(still_bert: Path, tmp_path: Path) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 2}
    _, plan = trained(recipe_for(still_bert, tmp_path, "prompt") | {"method": method})
    assert "last_layer off (the virtual tokens of default stand in rows)" in plan
