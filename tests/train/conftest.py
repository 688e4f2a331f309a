"""Directories with a tiny Llama and a tiny BERT and their tokenizer, and rows for them."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from byway.train.checkpoint import complete
from byway.train.reporting.events import Event, Stepped

WORDS = [f"w{i}" for i in range(56)]


def write_tokenizer(directory: Path, pad: str | None = "<pad>") -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token=pad, unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("base") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("base") / "tiny-bert"
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    torch.manual_seed(8)
    BertModel(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 3 to 20 words. Each word depends on the one before, so that there is something to learn."""
    import random

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        place = draw.randrange(len(WORDS))
        words = []
        for _ in range(draw.randint(3, 20)):
            words.append(WORDS[place])
            place = (place * 3 + draw.choice((1, 2))) % len(WORDS)
        rows.append({"text": " ".join(words)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


RecipeMaker = Callable[..., dict[str, Any]]


def build_recipe(llama_dir: Path, folder: Path, output: str = "run", rows: int = 24, **sections: Any) -> dict[str, Any]:
    """A recipe: 24 texts, two epochs of three steps. Keyword arguments replace keys of a section."""
    train = write_rows(folder / "train.jsonl", text_rows(rows))
    held_out = write_rows(folder / "eval.jsonl", text_rows(6, seed=1))
    recipe: dict[str, Any] = {
        "base": {"model": str(llama_dir), "device": "cpu"},
        "method": {"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.2},
        "data": {"train": str(train), "eval": str(held_out), "task": "text", "max_length": 64},
        "train": {"epochs": 2, "learning_rate": 1e-2, "rows_per_step": 8, "threads": 1, "micro_batch_tokens": 64},
        "output": str(folder / output),
    }
    for section, keys in sections.items():
        recipe[section] = {**recipe[section], **keys} if isinstance(keys, dict) and isinstance(recipe.get(section), dict) else keys
    return recipe


@pytest.fixture
def make_recipe(llama_dir: Path, tmp_path: Path) -> RecipeMaker:
    """:func:`build_recipe` in the test's own folder."""
    return lambda *names, **sections: build_recipe(llama_dir, tmp_path, *names, **sections)


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A real curve, drawn once."""
    from byway.train.reporting.log import curve_png

    return curve_png([{"step": 1, "loss": 1.0}])


@pytest.fixture
def quick_picture(picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the same picture for all runs: drawing the curve takes half the time of a tiny run."""
    monkeypatch.setattr(importlib.import_module("byway.train.reporting.report"), "curve_png", lambda rows, best_step=None: picture)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[Event], None]:
    """Return an observer that sends this process a signal after a step."""

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.row["step"] == step:
            os.kill(os.getpid(), number)

    return watch


def losses(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times and memory."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_mb")} for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    """Logged losses, last and best adapter, optimizer state and random generators are equal bit for bit."""
    from safetensors.torch import load_file

    assert losses(one) == losses(two)
    last = complete(one / "checkpoints")[0][1].name
    files = [f"checkpoints/{last}/{name}.safetensors" for name in ("adapter", "optimizer", "random")]
    for file in (*files, *(str(path.relative_to(one)) for path in (one / "adapter").glob("*.safetensors"))):
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys() and a
        assert all(bool((a[key] == b[key]).all()) for key in a), file


def tree(directory: Path) -> dict[str, bytes]:
    """Every file in a directory tree, with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
