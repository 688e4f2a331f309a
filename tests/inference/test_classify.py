"""Commands that write text say so of a model that does not, and show the scores of a classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForTokenClassification, pipeline

import byway
from byway.cli import main
from byway.errors import ConfigError, DataError
from byway.inference.classify import class_scores

TEXTS = ["w1 w2 w3", "w30 w4", "w5 w6 w7 w8 w9 w1 w2 " * 20]


@pytest.fixture(params=["bert", "llama"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_dir")


def adapter_of(base: Path, folder: Path, names: tuple[str, ...] = ("bad", "good", "so-so")) -> Path:
    torch.manual_seed(3)
    model, tokenizer = byway.load_base(base, task="classification", label_names=names)
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear"))
    for _, parameter in adapter.named_parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter.save(folder, tokenizer)


def test_generate_shows_the_scores_of_a_classifier(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_of(base, tmp_path / "a")
    arguments = ["generate", str(tmp_path / "a"), *(word for text in TEXTS for word in ("--prompt", text))]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "is a classifier, which writes no text" in shown.err and len(shown.out.splitlines()) == len(TEXTS)
    for line in shown.out.splitlines():
        scores = [float(part.rpartition(" ")[2]) for part in line.split(", ")]
        assert sum(scores) == pytest.approx(1, abs=2e-4) and scores == sorted(scores, reverse=True)
    assert main([*arguments, "--compare"]) == 0
    assert capsys.readouterr().out.count("base:    ") == len(TEXTS)


def test_chat_says_what_it_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_of(base, tmp_path / "a")
    assert main(["chat", str(tmp_path / "a")]) == 2
    shown = capsys.readouterr().err
    assert "ForSequenceClassification writes no text" in shown and "byway generate" in shown


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_the_scores_are_those_of_transformers_pipeline(bert_dir: Path, tmp_path: Path, problem: str) -> None:
    model, tokenizer = byway.load_base(bert_dir, task="classification", label_names=("bad", "good", "so-so"))
    model.config.problem_type = problem
    assert tokenizer is not None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    their_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs = pipeline("text-classification", their_model, tokenizer=their_tokenizer, top_k=None, device="cpu")
    expected = [{entry["label"]: entry["score"] for entry in row} for row in theirs(TEXTS[:2], truncation=True)]
    for found, row in zip(class_scores(model, tokenizer, TEXTS[:2]), expected, strict=True):
        assert found == pytest.approx(row, abs=1e-5)


def test_one_output_is_a_number(bert_dir: Path) -> None:
    model, tokenizer = byway.load_base(bert_dir, task="classification", num_labels=1)
    assert tokenizer is not None
    ((name, score),) = class_scores(model, tokenizer, TEXTS[:1])[0].items()
    with torch.no_grad():
        assert score == pytest.approx(float(model(**tokenizer(TEXTS[0], return_tensors="pt")).logits), abs=1e-5) and name


def test_what_cannot_be_classified_is_named(bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = byway.load_base(bert_dir, task="classification", num_labels=2)
    with pytest.raises(DataError, match="empty"):
        class_scores(model, tokenizer, ["  "])
    with pytest.raises(ConfigError, match="no tokenizer"):
        class_scores(model, None, ["a"])
    marker = BertForTokenClassification.from_pretrained(bert_dir)
    assert tokenizer is not None
    marker.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    byway.attach(byway.load_base(tmp_path / "m")[0], byway.LoRA(rank=2)).save(tmp_path / "a")
    assert main(["generate", str(tmp_path / "a"), "--prompt", "w1"]) == 2
    assert "BertForTokenClassification neither writes text nor classifies it" in capsys.readouterr().err
