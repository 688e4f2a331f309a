"""``byway data``: rows as the model will see them, with a tokenizer made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byway.cli import main

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
RECIPE = """\
base: {model: base}
method: {name: lora}
data: {train: train.jsonl, eval: eval.jsonl, max_length: 32}
output: runs/x
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a word tokenizer and a chat template; its weights are a stand-in."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "the", "sun", "is", "where", "?", "up", "\n"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")  # never read by this command
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    row = [{"role": "user", "content": "where is the sun ?"}, {"role": "assistant", "content": "the sun is up"}]
    other = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "up"}]
    Path("train.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (row, other)), encoding="utf-8")
    Path("eval.jsonl").write_text(json.dumps({"messages": row}) + "\n", encoding="utf-8")
    return tmp_path


def test_rows_are_shown_with_what_is_learned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "r.yaml", "--rows", "1"]) == 0
    said = capsys.readouterr()
    assert "train: train.jsonl: 2 of 2 rows used (messages)" in said.out
    assert "train.jsonl:1: 15 tokens, 5 in the loss" in said.out  # the sun is up <|im_end|>
    assert "⟦" in said.out and "the sun is up" in said.out.split("⟦")[1].split("⟧")[0] and "<|im_end|>»⟧" in said.out
    assert "eval: eval.jsonl: 1 of 1 row used" in said.out
    assert "warning: evaluation examples that are also training examples: 1" in said.err
    assert not Path("runs").exists()


def test_overrides_and_row_counts_are_respected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "r.yaml", "data.eval=null", "data.limit=1", "--rows", "0"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 row used" in out and "⟦" not in out and "eval" not in out


def test_classes_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.jsonl").write_text('{"text": "the sun", "label": "up"}\n{"text": "where ?", "label": "is"}\n', encoding="utf-8")
    assert main(["data", "r.yaml", "data.train=c.jsonl", "data.eval=null", "data.task=classification"]) == 0
    out = capsys.readouterr().out
    assert "classes: is 1, up 1" in out and "c.jsonl:1: 2 tokens, label up\nthe sun⟦ → up⟧" in out


def test_a_share_of_the_training_rows_is_held_out_as_in_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "r.yaml", "data.eval=null", "data.eval_fraction=0.5", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "train: train.jsonl: 1 of 1 row used" in out and "eval: train.jsonl: 1 of 1 row used" in out


def test_bad_rows_stop_or_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert main(["data", "r.yaml"]) == 2
    assert "train.jsonl:3" in capsys.readouterr().err
    assert main(["data", "r.yaml", "--skip-bad-rows"]) == 0
    assert "2 of 3 rows used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.train=gone.jsonl", "gone.jsonl"), ("base.model=./gone", "./gone"), ("train.epochs=0", "train.epochs is 0")],
)
def test_what_is_missing_is_named(place: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "r.yaml", override]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


@pytest.mark.parametrize("task", ["chat", "text"])
def test_a_broken_tokenizer_is_the_base_s_fault_and_no_bug(task: str, base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    Path("base").unlink()
    shutil.copytree(base, "base")
    Path("base/tokenizer.json").write_text("{broken", encoding="utf-8")
    assert main(["data", "r.yaml", f"data.task={task}"]) == 2
    said = capsys.readouterr()
    assert "error: the base 'base' cannot be loaded: transformers refuses its tokenizer" in said.err and "bug" not in said.err
    assert said.out == ""
