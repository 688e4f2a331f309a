"""A standalone evaluation with every saving gives what the plain, padded one gives, and what transformers gives row by row."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import byway
from byway.data.encode import Example
from byway.data.labelled import LabelledExample
from byway.engine.loss import tokens as engine_loss
from byway.errors import DataError
from byway.inference.evaluate import evaluate_run, measure
from byway.inference.runs import find
from byway.recipe.recipe import Recipe
from byway.tasks import load as load_task
from byway.tasks.task import Task
from byway.train import train
from tests.tasks.test_classification import labelled_rows
from tests.tiny import VOCABULARY, build, randomize
from tests.train.conftest import RecipeMaker, text_rows, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")

LORA = byway.LoRA(rank=4, targets="all-linear")
PROMPT = byway.PromptTuning(num_virtual_tokens=3)
PLAIN = {"pack": "off", "labels_only": "off", "share_prefix": "off"}


def made(folder: Path, task: str, rows: Sequence[Any], **engine: Any) -> tuple[Task[Any], Recipe]:
    file = write_rows(folder / f"{task}.jsonl", [*rows])
    method = {"name": "lora", "rank": 4, "targets": "all-linear"}
    recipe = Recipe.from_dict(
        {"method": method, "data": {"train": str(file), "task": task}, "train": {"micro_batch_tokens": 40}, "engine": engine, "output": "x"}
    )
    return load_task(task)(recipe.data, seed=0), recipe


def documents(seed: int) -> list[Example]:
    """Rows that differ much in length; some begin alike, one is a single token, one the beginning and the end token alone."""
    draw = random.Random(seed)
    head = [draw.randrange(3, VOCABULARY) for _ in range(12)]
    rows = []
    for number in range(14):
        ids = (head if number % 3 == 0 else []) + [draw.randrange(3, VOCABULARY) for _ in range(draw.choice((2, 5, 9, 30)))]
        learned = len(head) + 1 if number % 3 == 0 else 1
        rows.append(Example(ids, [-100] * learned + ids[learned:], str(number)))
    return [*rows, Example([5], [-100], "one token"), Example([1, 2], [-100, 2], "bos, eos")]


def prepared(family: str, method: byway.Method) -> Any:
    model = build(family)
    randomize(byway.attach(model, method).named_parameters())
    return model


def by_transformers(model: Any, rows: Sequence[Example]) -> float:
    """The mean loss over labels, a row at a time, without padding."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = sum(label != -100 for label in row.labels[1:])
            if labels:
                loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
                total, count = total + float(loss) * labels, count + labels
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_model_is_measured_as_if_padded(family: str, tmp_path: Path, seed: int) -> None:
    model, rows = prepared(family, LORA), documents(seed)
    task, recipe = made(tmp_path, "text", text_rows(3))
    adapter, base, computed = measure(model, task, rows, recipe)
    plainly = measure(model, task, rows, replace(recipe, engine=replace(recipe.engine, **PLAIN)))
    assert computed.startswith("rows packed, no padding, logits at labels only, shared prefixes once (12 tokens")
    assert plainly[2] == "rows padded, similar lengths together (switched off), all logits (switched off)"
    for own, other in ((adapter, plainly[0]), (base, plainly[1])):
        assert own.keys() == other.keys() == {"loss", "perplexity"}
        assert own == pytest.approx(other, rel=1e-5)
    assert adapter["loss"] == pytest.approx(by_transformers(model, rows), rel=1e-5)
    assert math.exp(adapter["loss"]) == pytest.approx(adapter["perplexity"])
    with byway.disabled(model):
        assert base["loss"] == pytest.approx(by_transformers(model, rows), rel=1e-5)
    assert abs(adapter["loss"] - base["loss"]) > 1e-3


def test_a_packed_classifier_is_measured_as_if_padded(tmp_path: Path, seed: int) -> None:
    model, draw = prepared("bert", LORA), random.Random(seed)
    rows = [
        LabelledExample(
            input_ids=[draw.randrange(3, VOCABULARY) for _ in range(draw.choice((1, 3, 7, 25)))],
            token_type_ids=None,
            label=draw.randrange(3),
            where=str(n),
        )
        for n in range(30)
    ]
    task, recipe = made(tmp_path, "classification", labelled_rows(8, 0), pack="on")
    adapter, base, computed = measure(model, task, rows, recipe)
    plainly = measure(model, task, rows, replace(recipe, engine=replace(recipe.engine, **PLAIN)))
    assert computed == "rows packed, no padding"
    assert adapter == pytest.approx(plainly[0], rel=1e-5) and base == pytest.approx(plainly[1], rel=1e-5)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row.input_ids])).logits for row in rows])
    labels = torch.tensor([row.label for row in rows])
    assert adapter["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert adapter["accuracy"] == float((logits.argmax(-1) == labels).double().mean())


def test_virtual_tokens_are_not_packed_and_say_so(tmp_path: Path, seed: int) -> None:
    model, rows = prepared("llama", PROMPT), documents(seed)
    task, recipe = made(tmp_path, "text", text_rows(3), pack="on")
    adapter, base, computed = measure(model, task, rows, recipe)
    plainly = measure(model, task, rows, replace(recipe, engine=replace(recipe.engine, **PLAIN)))
    assert "rows padded, similar lengths together (default cannot be packed: its virtual tokens are inside the rows)" in computed
    assert adapter == pytest.approx(plainly[0], rel=1e-5) and base == pytest.approx(plainly[1], rel=1e-5)


def test_nothing_is_differentiated_and_never_are_all_logits_held(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees a chunk at a time, and a graph is built neither in the proof nor in the measurement."""
    monkeypatch.setattr(engine_loss, "chunk_rows", lambda vocabulary, device: 4)
    model, rows = prepared("llama", LORA), documents(seed)
    task, recipe = made(tmp_path, "text", text_rows(3))
    seen: list[tuple[int, bool]] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append((out.shape[:-1].numel(), bool(out.requires_grad)))
    )
    measure(model, task, rows, recipe)
    measured = seen[next(n for n, (count, _) in enumerate(seen) if 0 < count <= 4) :]
    assert not any(graph for _, graph in seen)
    assert len(measured) > 20 and max(count for count, _ in measured) <= 4, "the plain computation of the probe comes first"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lever_that_does_not_stand_is_off_and_named(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs that leak are found out on the evaluation's own rows, even where the recipe insists."""
    from byway.data import collate

    real = collate.pack_batch

    def leaking(examples: Sequence[Example]) -> dict[str, Any]:
        batch = real(examples)
        ends = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
        return {**batch, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}

    monkeypatch.setattr("byway.tasks.causal_lm.pack_batch", leaking)
    model, rows = prepared("llama", LORA), documents(seed)
    task, recipe = made(tmp_path, "text", text_rows(3), pack="on", share_prefix="off")
    adapter, _, computed = measure(model, task, rows, recipe)
    assert "rows padded, similar lengths together (it does not reproduce the plain loss here" in computed
    assert "logits at labels only" in computed
    assert adapter["loss"] == pytest.approx(by_transformers(model, rows), rel=1e-5)


def test_rows_are_packed_where_that_saves_enough_or_where_it_is_asked_for(tmp_path: Path, seed: int) -> None:
    model, draw = prepared("llama", LORA), random.Random(seed)
    rows = [Example(ids := [draw.randrange(3, VOCABULARY) for _ in range(9 + n % 2)], [-100, *ids[1:]], str(n)) for n in range(16)]
    task, recipe = made(tmp_path, "text", text_rows(3))
    found = {pack: measure(model, task, rows, replace(recipe, engine=replace(recipe.engine, pack=pack))) for pack in ("auto", "on", "off")}
    assert "similar lengths together (packing saves 0.0% of the positions, which is not worth it), logits at labels" in found["auto"][2]
    assert found["on"][2].startswith("rows packed, no padding")
    assert found["off"][2].startswith("rows padded, similar lengths together (switched off)")
    for adapter, base, _ in found.values():
        assert adapter == pytest.approx(found["off"][0], rel=1e-5) and base == pytest.approx(found["off"][1], rel=1e-5)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    task, recipe = made(tmp_path, "text", text_rows(3))
    with pytest.raises(DataError, match="no rows to evaluate on"):
        measure(prepared("llama", LORA), task, [], recipe)


def test_a_run_is_measured_with_its_own_savings_or_plainly(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe())
    own, plain = (evaluate_run(find(run.directory), plain=plain) for plain in (False, True))
    assert "logits at labels only" in own.computed and "all logits (switched off)" in plain.computed
    assert own.adapter == pytest.approx(plain.adapter, rel=1e-5) and own.base == pytest.approx(plain.base, rel=1e-5)
    assert own.adapter["loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-5)
