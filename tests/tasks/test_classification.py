"""Classification as a task: the head, the measure, pairs, and a whole run on a tiny encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import byway
from byway.errors import DataError
from byway.recipe.sections import Data
from byway.tasks.classification import Classification
from byway.train import train
from tests.train.conftest import WORDS, write_rows, write_tokenizer

pytestmark = pytest.mark.usefixtures("quick_picture")


def labelled_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The class is from which half of the vocabulary the words come."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        half = draw.randrange(2)
        words = draw.choices(WORDS[half * len(WORDS) // 2 :][: len(WORDS) // 2], k=draw.randint(2, 10))
        rows.append({"sentence": " ".join(words), "label": ("low", "high")[half]})
    return rows


def recipe_for(bert_dir: Path, tmp_path: Path, **train_keys: Any) -> dict[str, Any]:
    rows = write_rows(tmp_path / "train.jsonl", labelled_rows(160, 0))
    held_out = write_rows(tmp_path / "eval.jsonl", labelled_rows(40, 1))
    return {
        "base": {"model": str(bert_dir), "device": "cpu"},
        "method": {"name": "lora", "rank": 8, "targets": "all-linear"},
        "data": {"train": str(rows), "eval": str(held_out), "task": "classification", "max_length": 32},
        "train": {"epochs": 3, "learning_rate": 2e-2, "rows_per_step": 20, "micro_batch_tokens": 256, "threads": 1} | train_keys,
        "output": str(tmp_path / "run"),
    }


def test_a_head_is_trained_beside_the_adapter_and_the_best_accuracy_is_kept(bert_dir: Path, tmp_path: Path) -> None:
    run = train(recipe_for(bert_dir, tmp_path, epochs=5))
    assert run.metrics["eval_accuracy"] >= 0.8, run.metrics  # 0.85 to 1 over eight seeds; 0.5 is chance
    names = [name for name, _ in run.adapter.named_parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    assert any(name.startswith("classifier.") for name in names) and any("lora_A" in name for name in names)
    assert run.model.config.id2label == {0: "high", 1: "low"}, "names in sorted order"
    # the saved adapter, on a base whose head is drawn anew, gives the same answers
    torch.manual_seed(12345)
    model, tokenizer = byway.load_base(bert_dir, task="classification", label_names=("high", "low"))
    byway.load(model, run.directory / "adapter")
    task = Classification(Data(train=str(tmp_path / "eval.jsonl"), task="classification", labels=("high", "low")), seed=0)
    assert task.evaluate(model, task.encode(tokenizer, 64).train)["accuracy"] == run.metrics["eval_accuracy"]


def test_loss_and_accuracy_equal_those_counted_by_hand(bert_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled_rows(13, 3))
    task = Classification(Data(train=str(rows), task="classification"), seed=0)
    assert task.names == ("high", "low")
    torch.manual_seed(0)
    model, tokenizer = byway.load_base(bert_dir, **task.base_options())
    examples = task.encode(tokenizer, 64).train
    losses, hits = [], 0
    for example, row in zip(examples, labelled_rows(13, 3), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        label = ("high", "low").index(row["label"])
        losses.append(-F.log_softmax(logits, -1)[label].item())
        hits += int(logits.argmax()) == label
    found = task.evaluate(model, examples, micro_tokens=40)
    assert found["loss"] == pytest.approx(sum(losses) / 13, rel=1e-5)
    assert found["accuracy"] == hits / 13


def test_pairs_of_sentences_are_one_example_each(bert_dir: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": "w1 w2", "sentence2": "w3", "label": i % 3} for i in range(6)]
    task = Classification(Data(train=str(write_rows(tmp_path / "rows.jsonl", rows)), task="classification"), seed=0)
    _, tokenizer = byway.load_base(bert_dir)
    examples = task.encode(tokenizer, 64).train
    assert task.names == ("0", "1", "2") and [e.label for e in examples] == [0, 1, 2, 0, 1, 2]
    words = tokenizer.convert_ids_to_tokens(examples[0].input_ids)  # pyright: ignore[reportOptionalMemberAccess]
    assert [w for w in words if w.startswith("w")] == ["w1", "w2", "w3"]


def test_one_class_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "label": "same"}] * 4)
    with pytest.raises(DataError, match="all rows have the same class"):
        Classification(Data(train=str(rows), task="classification"), seed=0)


@pytest.mark.parametrize(("named", "stated"), [(None, None), ("</s>", 0)])
def test_a_decoder_without_a_padding_token_is_trained_packed_evaluated_and_merged_with_one_answer(tmp_path: Path, named, stated) -> None:
    import transformers

    from byway.inference.evaluate import evaluate_run
    from byway.inference.runs import find
    from byway.workshop.merge.files import merge_files

    directory = tmp_path / "base"
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=stated)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory, pad=named)
    run = train(recipe_for(directory, tmp_path, epochs=2))
    packed, again, padded = (evaluate_run(find(run.directory), plain=plain) for plain in (False, False, True))
    assert packed.computed.startswith("rows packed") and padded.computed.startswith("rows padded")
    assert packed.adapter == pytest.approx(padded.adapter, rel=1e-4)
    assert packed.adapter["accuracy"] == pytest.approx(run.metrics["eval_accuracy"])
    assert packed.base == again.base, "the head of the bare base is the one that training started from"
    merge_files(directory, run.directory, tmp_path / "merged")
    pipeline: Any = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    rows = labelled_rows(40, 1)
    for size in (1, 8):
        found = [answer["label"] for answer in pipeline([row["sentence"] for row in rows], batch_size=size)]
        hits = sum(label == row["label"] for label, row in zip(found, rows, strict=True))
        assert hits / len(rows) == pytest.approx(packed.adapter["accuracy"])
    assert pipeline.model.config.pad_token_id == pipeline.tokenizer.pad_token_id == 2


def test_token_ids_outside_the_vocabulary_are_bad_rows(bert_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": "a"}, {"text": "w55 w1", "label": "b"}]
    task = Classification(Data(train=str(write_rows(tmp_path / "rows.jsonl", rows)), task="classification"), seed=0)
    _, tokenizer = byway.load_base(bert_dir)
    with pytest.raises(DataError, match="has the token id 61; the vocabulary has 60 ids, 0 to 59"):
        task.encode(tokenizer, 60)


def test_levers_for_language_models_are_refused_when_asked_for(bert_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(byway.ConfigError, match=r"engine\.labels_only is on, but it is for language models"):
        train(recipe_for(bert_dir, tmp_path) | {"engine": {"labels_only": "on"}})
    assert not (tmp_path / "run").exists()
