"""Runs with and without packing give the same losses, evaluations and adapters, for a classifier and a causal model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from byway.inference.evaluate import evaluate_run
from byway.inference.runs import find
from byway.train import Stopped, train
from byway.train.reporting.events import Event, Planned
from tests.tasks.test_classification import labelled_rows
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")


@pytest.fixture
def still_bert(bert_dir: Path, tmp_path: Path) -> Path:
    """The tiny BERT without dropout, so that two layouts of the same rows compute the same."""
    directory = tmp_path / "still-bert"
    shutil.copytree(bert_dir, directory)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def recipe_for(base: Path, folder: Path, output: str, **sections: Any) -> dict[str, Any]:
    train_rows = write_rows(folder / "train.jsonl", labelled_rows(60, 0))
    held_out = write_rows(folder / "eval.jsonl", labelled_rows(20, 1))
    recipe: dict[str, Any] = {
        "base": {"model": str(base), "device": "cpu"},
        "method": {"name": "lora", "rank": 4, "targets": "all-linear"},
        "data": {"train": str(train_rows), "eval": str(held_out), "task": "classification", "max_length": 32},
        "train": {"epochs": 1, "learning_rate": 1e-2, "rows_per_step": 12, "micro_batch_tokens": 64, "threads": 1},
        "output": str(folder / output),
    }
    return {key: {**value, **sections[key]} if key in sections and isinstance(value, dict) else value for key, value in recipe.items()} | {
        key: value for key, value in sections.items() if key not in recipe
    }


def assert_same_numbers(runs: list[Path]) -> None:
    rows = [losses(path) for path in runs]
    assert len(rows[0]) == len(rows[1]) > 0
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert {k: a.get(k) for k in ("step", "tokens", "labels", "accuracy")} == {
            k: b.get(k) for k in ("step", "tokens", "labels", "accuracy")
        }


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 4, "targets": "all-linear"},
        {"name": "ladder_side_tuning", "reduction": 4},
        {"name": "prefix_tuning", "num_virtual_tokens": 2, "hidden_size": 8},
    ],
    ids=lambda method: method["name"],
)
def test_a_classifier_learns_the_same_packed_and_padded(still_bert: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    plans: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            plans.append(event.plan.levers)

    runs = []
    for pack in ("on", "off"):
        recipe = recipe_for(still_bert, tmp_path, pack, engine={"pack": pack}) | {"method": method}
        runs.append(train(recipe, on_event=watch).directory)
    assert_same_numbers(runs)
    assert "pack on" in plans[0] and "pack off (switched off)" in plans[1]
    assert "labels_only off (it is for language models" in plans[0] and "frontier on" in plans[0]
    measured = [evaluate_run(find(path)) for path in runs]
    assert measured[0].adapter["loss"] == pytest.approx(measured[1].adapter["loss"], rel=1e-4)
    best = min((row for row in losses(runs[0]) if row.get("eval")), key=lambda row: (-row["accuracy"], row["loss"]))
    assert measured[0].adapter["accuracy"] == best["accuracy"]


def test_a_packed_classifier_resumes_in_the_same_bits(bert_dir: Path, tmp_path: Path) -> None:
    """With dropout, a resume repeats the random draws."""
    keys = {"train": {"save_every": 2}, "engine": {"pack": "on"}}
    whole = train(recipe_for(bert_dir, tmp_path, "whole", **keys))
    with pytest.raises(Stopped):
        train(recipe_for(bert_dir, tmp_path, "pieces", **keys), on_event=interrupt_at(3))
    resumed = train(recipe_for(bert_dir, tmp_path, "pieces", **keys), resume=True)
    assert_same_run(whole.directory, resumed.directory)


def test_a_causal_model_learns_the_same_packed_and_padded(make_recipe: RecipeMaker) -> None:
    runs = [train(make_recipe(pack, method={"dropout": 0.0}, engine={"pack": pack})).directory for pack in ("on", "off")]
    assert_same_numbers(runs)
    adapters = [load_file(next((path / "adapter").glob("*.safetensors"))) for path in runs]
    for key, tensor in adapters[0].items():
        assert (tensor - adapters[1][key]).norm() <= 1e-3 * tensor.norm(), key


def test_rows_of_one_length_are_not_packed_unless_asked(still_bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "same.jsonl", [{"sentence": f"w{i} w{i + 1}", "label": ("a", "b")[i % 2]} for i in range(12)])
    plans: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            plans.append(event.plan.levers)

    for pack in ("auto", "on"):
        recipe = recipe_for(still_bert, tmp_path, pack, engine={"pack": pack})
        recipe["data"] = {"train": str(rows), "task": "classification"}
        train(recipe, on_event=watch)
    assert "pack off (all rows have the same length, so there is no padding)" in plans[0]
    assert "pack on" in plans[1]
