"""Step 2: what the pages show is run, on a tiny base or on the built-in one where it is in the cache, and gives what they say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import byway
from byway.cli import main
from byway.cli._quickstart import measure
from byway.core.disk.caches import cache_root
from tests.docs.pages import ROOT, blocks, commands
from tests.workshop.conftest import chat_rows, chat_tokenizer, llama, moved_off_zero, saved

torch.set_num_threads(1)
README = ROOT / "README.md"
CHAT = "chat.yaml"
SMALL = ["base.device=cpu", "train.max_steps=2", "train.tokens_per_step=256", "train.threads=1"]
"""What makes a command of a page quick; everything else is as written."""


@pytest.fixture
def place(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of somebody who follows the README: recipes, chat.jsonl, and a tiny base in ``my-base``."""
    saved(llama(tied=True), tmp_path / "my-base", chat_tokenizer())
    chat_rows(tmp_path / "chat.jsonl", 20)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder whose linear maps are called as MiniLM's are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, "good", "bad", "film", "a"])}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    return saved(BertModel(BertConfig(vocab_size=8, **sizes)), tmp_path_factory.mktemp("bert") / "base", tokenizer)


def test_the_readmes_commands_run_one_after_another(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [words[1:] for _, words in commands(README) if words[0] == "byway" and any(w in (CHAT, "runs/chat") for w in words)]
    assert [words[0] for words in steps] == ["data", "doctor", "train", "eval", "generate", "merge"]
    (place / "chat.jsonl").unlink()
    assert main(["init"]) == 0
    for words in steps:
        with_small = [*words, "base.model=my-base", *SMALL] if CHAT in words else words
        code = main([*with_small, "--max-new-tokens", "4"] if words[0] == "generate" else with_small)
        out, err = capsys.readouterr()
        assert code == 0, f"byway {' '.join(with_small)}\n{out}{err}"
    assert {entry.name for entry in (place / "runs/chat").iterdir()} == {
        "adapter", "checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml", "report.html",
    }  # fmt: skip
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"


PAGES = [page for page in sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/methods").glob("*.md")]) if blocks(page, "python")]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_example_of_a_page_runs_by_itself(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block.text, page.name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "recipes").glob("*.yaml"))])
def test_every_recipe_dry_runs(name: str, place: Path, bert_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = byway.Recipe.load(place / "recipes" / name)
    base, changes = "my-base", ["data.max_length=1024"]
    for split in (recipe.data.train, recipe.data.eval):
        if split is None or split == "chat.jsonl":
            continue
        file = place / str(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        if recipe.data.task == "classification":
            file.write_text("".join(json.dumps({"sentence": f"a {w} film", "label": i}) + "\n" for i, w in enumerate(("bad", "good"))))
            base, changes = str(bert_base), []
        else:
            shutil.copy(ROOT / str(split), file)
            changes += ["data.limit=6", "data.eval_limit=2"]
    assert main(["train", f"recipes/{name}", "--dry-run", f"base.model={base}", "base.dtype=auto", *SMALL[:1], *changes]) == 0
    out = capsys.readouterr().out
    assert f"output   {recipe.output}" in out
    assert not (place / "runs").exists()


def test_the_six_lines_print_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_root() / "bases"
    if not (folder.is_dir() and any(folder.iterdir())):
        pytest.skip(f"the built-in base is not in the cache ({folder}): make base fetches it")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks(README, "python")[0].text, "README.md", "exec"), namespace)
    assert printed.getvalue() == blocks(README, "text")[0].text
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert byway.adapters(namespace["model"]) == {}


def test_peft_loads_our_adapter_with_the_readmes_lines(place: Path) -> None:
    model, _ = byway.load_base("my-base")
    adapter = moved_off_zero(byway.attach(model, byway.LoRA(rank=4, targets="all-linear")))
    adapter.save("my-adapter")
    ids = torch.randint(3, 300, (2, 9))
    namespace: dict[str, Any] = {}
    exec(compile(blocks(README, "python")[1].text, "README.md", "exec"), namespace)
    with torch.no_grad():
        ours, theirs = model(ids).logits, namespace["model"].eval()(ids).logits
        with byway.disabled(model):
            bare = model(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - bare).abs().max() > 1e-2


def test_errors_look_as_their_page_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    found = [block for block in blocks(ROOT / "docs" / "errors.md", "text") if block.text.startswith("$ byway ")]
    assert len(found) == 3
    for block in found:
        command, _, shown = block.text.removeprefix("$ byway ").partition("\n")
        assert main(shlex.split(command)) == 2
        assert capsys.readouterr().err == shown, block.where


def test_a_bad_row_looks_as_the_data_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blocks(ROOT / "docs" / "data.md", "text")[0].text
    bad = re.search(r"\): (\{.*)$", shown, re.MULTILINE)
    assert bad is not None
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' + bad[1] + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    from byway.data.rows import read_rows

    with pytest.raises(byway.DataError) as refused:
        read_rows("rows.jsonl")
    error = refused.value
    assert [line.rstrip() for line in f"error: {error.message}\nhint: {error.hint}\n".splitlines()] == shown.splitlines()


def test_a_method_outside_the_package_trains_saves_loads_and_merges(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    run = byway.train(
        {
            "base": {"model": "my-base", "device": "cpu"},
            "method": {"name": "toy_method:Scale", "targets": ["q_proj", "down_proj"]},
            "data": {"train": "chat.jsonl"},
            "train": {"max_steps": 3, "rows_per_step": 4, "learning_rate": 0.1, "threads": 1},
            "output": "runs/toy",
        }
    )
    from toy_method import Scale

    assert not isinstance(run.adapter, tuple)
    assert isinstance(run.adapter.method, Scale)
    assert run.adapter.num_parameters == 2 * (32 + 32)
    gains = dict(run.adapter.named_parameters())
    assert all(gain.abs().max() > 0 for gain in gains.values())
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        trained = run.model(ids).logits
    fresh, _ = byway.load_base("my-base")
    with torch.no_grad():
        bare = fresh(ids).logits
    byway.load(fresh, "runs/toy/adapter", methods=(Scale,))
    with torch.no_grad():
        loaded = fresh(ids).logits
    assert torch.equal(loaded, trained)
    assert (loaded - bare).abs().max() > 1e-3
    assert byway.merge(fresh).skipped == {}
    with torch.no_grad():
        merged = fresh(ids).logits
    assert (merged - trained).norm() <= 1e-5 * trained.norm()
    assert byway.adapters(fresh) == {}


def test_a_method_outside_the_package_is_not_imported_because_a_file_names_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from toy_method import Scale

    model, _ = byway.load_base("my-base")
    byway.attach(model, Scale()).save("toy")
    byway.detach(model)
    with pytest.raises(byway.AdapterError, match="toy_method:Scale"):
        byway.load(model, "toy")


def test_the_example_counts_with_gpt2s_transposed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import build, inputs, randomize

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from toy_method import Scale

    model, x = build("gpt2"), inputs("gpt2")
    adapter = byway.attach(model, Scale(targets=["c_attn"]))
    randomize(adapter.named_parameters())
    with torch.no_grad():
        before = model(**x).logits
        byway.merge(model)
        assert (model(**x).logits - before).norm() <= 1e-5 * before.norm()


def test_the_quickstart_recipe_names_the_data_in_the_package() -> None:
    recipe = byway.Recipe.load(ROOT / "recipes" / "quickstart.yaml")
    assert os.path.samefile(ROOT / str(recipe.data.train), measure.path("train"))
    assert os.path.samefile(ROOT / str(recipe.data.eval), measure.path("held_out"))
