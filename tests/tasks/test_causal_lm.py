"""Next-token prediction as a task, against transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import byway
from byway.engine.attention.packing import packing
from byway.errors import DataError
from byway.recipe.sections import Data
from byway.tasks import load
from byway.tasks.causal_lm import CausalLM
from tests.train.conftest import text_rows, write_rows


def made(tmp_path: Path, count: int = 9, **keys: object) -> CausalLM:
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(count))
    values = {"train": str(rows), "task": "text", "max_length": 64} | keys
    return CausalLM(Data(**values), seed=0)  # pyright: ignore[reportArgumentType]


def test_chats_and_texts_are_both_next_token_prediction() -> None:
    assert issubclass(load("chat"), CausalLM) and issubclass(load("text"), CausalLM)


def test_evaluation_equals_transformers_loss_over_all_tokens(tmp_path: Path, llama_dir: Path) -> None:
    """Rows of uneven length, in several batches, padded and packed: the mean over tokens, not over rows or batches."""
    model, tokenizer = byway.load_base(llama_dir)
    task = made(tmp_path)
    rows = task.encode(tokenizer, 64)
    total, count = 0.0, 0
    for example in rows.train:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    for micro_tokens in (24, 1000):
        found = task.evaluate(model, rows.train, micro_tokens=micro_tokens)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        with packing(model):
            packed = task.evaluate(model, rows.train, micro_tokens=micro_tokens, pack=True, labels_only=True)
        assert packed["loss"] == pytest.approx(total / count, rel=1e-5)
    assert sum(task.labels(e) for e in rows.train) == count


def test_an_evaluation_puts_every_mode_back(tmp_path: Path, llama_dir: Path) -> None:
    model, tokenizer = byway.load_base(llama_dir)
    task = made(tmp_path)
    model.train()
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    task.evaluate(model, task.encode(tokenizer, 64).train)
    assert [module.training for module in model.modules()] == before


def test_a_held_out_share_is_the_same_in_every_run_and_disjoint(tmp_path: Path) -> None:
    one, two = (made(tmp_path, 40, eval_fraction=0.2) for _ in range(2))
    assert one.held_out is not None and two.held_out is not None
    out = [d.where for d in one.held_out.items]
    assert len(out) == 8 and out == [d.where for d in two.held_out.items]
    assert not set(out) & {d.where for d in one.documents.items} and len(one.documents.items) == 32
    data = Data(train=str(tmp_path / "rows.jsonl"), task="text", eval_fraction=0.2, eval_limit=3)
    other = CausalLM(data, seed=1).held_out
    assert other is not None and len(other.items) == 3 and [d.where for d in other.items] != out[:3]


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        made(tmp_path, 1, eval_fraction=0.5)


def test_rows_that_are_in_both_sets_are_pointed_out(tmp_path: Path, llama_dir: Path) -> None:
    _, tokenizer = byway.load_base(llama_dir)
    task = made(tmp_path, eval=str(tmp_path / "rows.jsonl"), eval_limit=4)
    rows = task.encode(tokenizer, 64)
    assert rows.notes == ("evaluation examples that are also training examples: 4",)
    assert task.digest(rows.train) != task.digest(rows.evaluation) == task.digest(rows.train[:4])
