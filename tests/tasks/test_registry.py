"""A task is one file: in a package of one's own, named by import path, or in ``byway/tasks``, named by the file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import byway
from byway import tasks
from byway.errors import ConfigError
from byway.inference.evaluate import evaluate_run
from byway.inference.runs import find
from byway.recipe.sections import Data
from byway.train import train
from tests.train.conftest import text_rows, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")

PARITY = '''
"""Tell whether a text has an even or an odd number of words; its labels are counted, not read."""

from byway.data.collate import pack_labelled, pad_labelled, pad_token_id
from byway.data.encode import Encoded
from byway.data.labelled import LabelledExample
from byway.data.report import Tally
from byway.engine.loss.cross_entropy import summed_loss
from byway.tasks.classification import row_logits
from byway.tasks.task import Task


class Parity(Task[LabelledExample]):
    """Train to tell even from odd."""

    head = "classification"
    formats = ("text",)
    criterion = "error"

    def base_options(self):
        return {"task": self.head, "label_names": ("even", "odd")}

    def encode_documents(self, documents, tokenizer, vocabulary_size):
        self.pad_id = pad_token_id(tokenizer)
        tally = Tally(documents.source, documents.format, self.data.max_length, documents.bad.copy())
        examples = []
        for document in documents.items:
            ids = tokenizer(document.text).input_ids
            examples.append(LabelledExample(ids, len(document.text.split()) % 2, document.where))
            tally.rows += 1
            tally.used += 1
            tally.examples += 1
            tally.tokens += len(ids)
        return Encoded(examples, tally.report())

    def collate(self, examples, *, packed=False):
        return (pack_labelled if packed else pad_labelled)(examples, self.pad_id)

    def length(self, example):
        return len(example.input_ids)

    def labels(self, example):
        return 1

    def where(self, example):
        return example.where

    def content(self, example):
        return example.input_ids, example.label

    def loss(self, model, batch, *, labels_only=False):
        logits = row_logits(model, batch)
        return summed_loss(logits, batch["labels"], self.terms), len(logits)

    def measure(self, model, batch, *, labels_only=False):
        logits = row_logits(model, batch)
        wrong = int((logits.argmax(-1) != batch["labels"]).sum())
        return {"loss": float(summed_loss(logits, batch["labels"])), "labels": len(logits), "wrong": wrong}

    def metrics(self, sums):
        return {"loss": sums["loss"] / sums["labels"], "error": sums["wrong"] / sums["labels"]}
'''


@pytest.fixture
def recipe(bert_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": {"model": str(bert_dir), "device": "cpu"},
        "method": {"name": "lora", "rank": 4},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl", text_rows(12))),
            "eval": str(write_rows(tmp_path / "eval.jsonl", text_rows(9, seed=1))),
        },
        "train": {"max_steps": 2, "rows_per_step": 6, "threads": 1},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The task in a module outside the package."""
    (tmp_path / "toy_of_parity.py").write_text(PARITY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_of_parity:Parity"
    sys.modules.pop("toy_of_parity", None)


@pytest.fixture
def by_file(tmp_path: Path) -> Iterator[str]:
    """The task in a file of ``byway.tasks``: a further folder of that package."""
    folder = tmp_path / "further"
    folder.mkdir()
    (folder / "parity.py").write_text(PARITY, encoding="utf-8")
    tasks.__path__.append(str(folder))
    importlib.invalidate_caches()
    yield "parity"
    tasks.__path__.remove(str(folder))
    sys.modules.pop("byway.tasks.parity", None)


@pytest.fixture(params=["by_path", "by_file"])
def name(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_a_task_of_ones_own_is_trained_and_evaluated(name: str, recipe: dict[str, Any]) -> None:
    run = train(recipe | {"data": recipe["data"] | {"task": name}})
    assert run.metrics["step"] == 2 and 0 <= run.metrics["eval_error"] <= 1
    assert f"task: {name}" in (run.directory / "recipe.yaml").read_text(encoding="utf-8").replace('"', "").replace("'", "")
    found = find(run.directory, allow_import=True)
    assert found.task == "classification" and found.num_labels == 2
    measured = evaluate_run(found)
    assert measured.rows == 9 and measured.adapter.keys() == {"loss", "error"}
    assert measured.adapter["loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-5)
    assert measured.adapter["error"] == run.metrics["eval_error"]


def test_the_tasks_of_the_package_are_its_files(by_file: str) -> None:
    assert tasks.names() == ("chat", "classification", by_file, "text")
    for name in tasks.names():
        assert tasks.load(name).__module__ == f"byway.tasks.{name}"
    with pytest.raises(ConfigError, match="there is no task 'chatt'") as caught:
        tasks.load("chatt")
    assert "did you mean 'chat'" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot import 'nowhere'"):
        tasks.load("nowhere:Toy")


KEYS: list[tuple[dict[str, Any], set[str]]] = [
    ({"labels": ("a", "b")}, {"classification"}),
    ({"template": "{{ x }}"}, {"chat"}),
    ({"learn": "last"}, {"chat"}),
    ({"learn": "all"}, {"chat", "classification", "text"}),
]


@pytest.mark.parametrize(("keys", "fitting"), KEYS)
@pytest.mark.parametrize("name", ["chat", "classification", "text"])
def test_a_key_of_another_task_is_refused_before_anything_is_read(name: str, keys: dict[str, Any], fitting: set[str]) -> None:
    """The file of rows does not exist: a task that takes the key gets as far as that."""
    data = Data(train="nowhere.jsonl", task=name, **keys)
    expected = byway.DataError if name in fitting else ConfigError
    message = "nowhere.jsonl does not exist" if name in fitting else rf"data\.{next(iter(keys))}.* but data\.task is {name}"
    with pytest.raises(expected, match=message):
        tasks.load(name)(data, seed=0)
    assert [key for key, _ in tasks.load(name).check(data)] == ([] if name in fitting else [*keys])
