"""Label smoothing and z-loss from the recipe to the gradient: what is minimized and logged, and what evaluations leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

import byway
from byway.engine.loss.cross_entropy import LossTerms
from byway.errors import ConfigError
from byway.recipe.recipe import Recipe
from byway.recipe.sections import Data, Train
from byway.tasks.causal_lm import CausalLM
from byway.tasks.classification import Classification
from byway.train.loop import train
from tests.train.conftest import RecipeMaker, text_rows, write_rows

TERMS = LossTerms(label_smoothing=0.2, z_loss=0.03)


def theirs(logits: Tensor, labels: Tensor, *, shifted: bool) -> float:
    """transformers' label smoothing, averaged over labels, and the z-loss by its formula."""
    smoothed = LabelSmoother(epsilon=0.2)({"logits": logits}, labels.clone(), shift_labels=shifted)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    normalizers = logits.exp().sum(-1).log()[labels != -100]
    return float(smoothed + 0.03 * normalizers.square().mean())


@pytest.mark.parametrize("labels_only", [True, False])
def test_next_tokens_are_learned_with_both_and_measured_without(tmp_path: Path, llama_dir: Path, labels_only: bool) -> None:
    model, tokenizer = byway.load_base(llama_dir)
    source = str(write_rows(tmp_path / "rows.jsonl", text_rows(9)))
    task = CausalLM(Data(train=source, task="text", max_length=64), seed=0, terms=TERMS)
    examples = task.encode(tokenizer, 64).train
    batch = task.collate(examples)
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        total, count = task.loss(model, batch, labels_only=labels_only)
    assert float(total) / count == pytest.approx(theirs(out.logits, batch["labels"], shifted=True), rel=1e-5)
    assert task.evaluate(model, examples, labels_only=labels_only)["loss"] == pytest.approx(float(out.loss), rel=1e-5)


def test_classes_are_learned_with_both_and_measured_without(tmp_path: Path, bert_dir: Path) -> None:
    rows = [{"text": row["text"], "label": str(index % 3)} for index, row in enumerate(text_rows(9))]
    task = Classification(Data(train=str(write_rows(tmp_path / "rows.jsonl", rows)), task="classification"), seed=0, terms=TERMS)
    torch.manual_seed(0)
    model, tokenizer = byway.load_base(bert_dir, **task.base_options())
    examples = task.encode(tokenizer, 64).train
    batch = task.collate(examples)
    with torch.no_grad():
        out = model(**batch)
        total, count = task.loss(model, batch)
    assert float(total) / count == pytest.approx(theirs(out.logits, batch["labels"], shifted=False), rel=1e-5)
    assert task.evaluate(model, examples)["loss"] == pytest.approx(float(out.loss), rel=1e-5)


@pytest.mark.usefixtures("quick_picture")
def test_a_run_logs_what_it_minimizes_and_evaluates_the_likelihood_alone(make_recipe: RecipeMaker, tmp_path: Path, llama_dir: Path) -> None:
    keys = {"epochs": 1, "rows_per_step": 24, "label_smoothing": 0.2, "z_loss": 0.03}
    run = train(make_recipe(train=keys, method={"name": "lora", "dropout": 0.0}))
    model, tokenizer = byway.load_base(llama_dir)
    held_out = CausalLM(Data(train=str(tmp_path / "eval.jsonl"), task="text", max_length=64), seed=0)
    rows = CausalLM(Data(train=str(tmp_path / "train.jsonl"), task="text", max_length=64), seed=0)
    batch = rows.collate(rows.encode(tokenizer, 64).train)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert run.metrics["step"] == 1, "the adapter of the first step does nothing yet"
    assert run.metrics["loss"] == pytest.approx(theirs(logits, batch["labels"], shifted=True), rel=1e-4)
    likelihood = held_out.evaluate(run.model, held_out.encode(tokenizer, 64).train)["loss"]
    logged = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["loss"] for row in logged if row.get("eval")] == [pytest.approx(likelihood, rel=1e-5)]


def test_the_names_of_other_trainers_are_read() -> None:
    given: dict[str, Any] = {"method": {"name": "lora"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}
    recipe = Recipe.from_dict({**given, "label_smoothing_factor": 0.1, "train": {"z_loss_coefficient": 1e-4}})
    assert (recipe.train.label_smoothing, recipe.train.z_loss) == (0.1, 1e-4)
    assert (Train().label_smoothing, Train().z_loss) == (0.0, 0.0)


@pytest.mark.parametrize(("key", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1e-4), ("z_loss", "much")])
def test_what_is_no_share_and_no_weight_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{key}"):
        Train(**{key: value})
