"""Virtual tokens through a whole run: prompt and classification rows, optimizations, resume, generate, evaluate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import byway
from byway.errors import RunError
from byway.inference.evaluate import evaluate_run
from byway.inference.generate import generate_text
from byway.inference.runs import find
from byway.train.reporting.events import Stepped
from tests.train.conftest import WORDS, RecipeMaker, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")
METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 4},
    "template": {"name": "prompt_tuning", "template": "<T*2> w1 {text} w2 <T>"},
    "p_tuning": {"name": "p_tuning", "template": "<T> {text} <T>", "encoder": "lstm"},
}


@pytest.fixture(params=METHODS)
def recipe(request: pytest.FixtureRequest, make_recipe: RecipeMaker, tmp_path: Path) -> dict[str, Any]:
    """Completions of one of two words, which a prompt can learn to say."""
    made = make_recipe(method=METHODS[request.param])
    made["method"] = METHODS[request.param]
    draw = random.Random(1)
    rows = [{"prompt": " ".join(draw.sample(WORDS, 3)), "completion": " " + draw.choice(WORDS[:2])} for _ in range(32)]
    made["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", rows)), "eval": str(write_rows(tmp_path / "held.jsonl", rows[:8]))}
    made["train"] = {"epochs": 6, "learning_rate": 0.3, "rows_per_step": 8, "threads": 1, "schedule": "constant"}
    return made


def test_it_learns_saves_generates_and_evaluates(recipe: dict[str, Any]) -> None:
    steps: list[float] = []
    run = byway.train(recipe, on_event=lambda e: steps.append(e.row["loss"]) if isinstance(e, Stepped) else None)
    assert steps[-1] < steps[0]
    found = find(run.directory)
    measured = evaluate_run(found)
    assert measured.adapter["loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
    assert measured.adapter["loss"] < 0.99 * measured.base["loss"]
    model, tokenizer, _ = found.load()
    prompts = ["w3 w4 w5", "w6"]
    together = generate_text(model, tokenizer, prompts, max_new_tokens=4, raw=True)
    assert together == [generate_text(model, tokenizer, [p], max_new_tokens=4, raw=True)[0] for p in prompts]


def test_a_resumed_run_is_the_uninterrupted_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"epochs": 2, "save_every": 2}

    def stop(event: Any) -> None:
        if isinstance(event, Stepped) and event.row["step"] == 5:
            raise RunError("stopped")

    whole = byway.train(recipe | {"output": str(tmp_path / "whole")})
    with pytest.raises(RunError, match="stopped"):
        byway.train(recipe | {"output": str(tmp_path / "cut")}, on_event=stop)
    resumed = byway.train(recipe | {"output": str(tmp_path / "cut")}, resume=True)
    first, second = (dict(run.adapter.state_dict()) for run in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_classification_learns_with_virtual_tokens_after_cls(bert_dir: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    rows = [{"text": " ".join(draw.choices(WORDS[:9] if i % 2 else WORDS[9:18], k=6)), "label": ["no", "yes"][i % 2]} for i in range(48)]
    recipe = {
        "base": {"model": str(bert_dir), "device": "cpu"},
        "method": {"name": "prompt_tuning", "template": "<T*2> {text} <T*2>"},
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "task": "classification", "eval_fraction": 0.25},
        "train": {"epochs": 6, "learning_rate": 0.02, "rows_per_step": 8, "threads": 1},
        "output": str(tmp_path / "run"),
    }
    run = byway.train(recipe)
    assert run.metrics["eval_accuracy"] > 0.8
    assert json.loads((run.directory / "adapter" / "byway_adapter.json").read_text())["method"] == "prompt_tuning"
    assert evaluate_run(find(run.directory)).adapter["accuracy"] == run.metrics["eval_accuracy"]
