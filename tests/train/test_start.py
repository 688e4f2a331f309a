"""Recipes that start from an adapter, and recipes that add tokens to the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import byway
from byway.errors import BywayError, ConfigError
from byway.inference.runs import find
from byway.train.signals import Stopped
from tests.train.conftest import RecipeMaker, losses, text_rows, write_rows

TOKENS = ["<tool>", "<end_tool>", "<never>"]
METHODS = [byway.LoRA(rank=3, targets=["q_proj"]), byway.DoRA(rank=2), byway.BottleneckAdapter(reduction=4)]


def adapter_of(llama_dir: Path, directory: Path, method: Any) -> Path:
    """An adapter whose update is not zero."""
    model, _ = byway.load_base(llama_dir)
    adapter = byway.attach(model, method)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    adapter.save(directory)
    return directory


def first_loss(recipe: dict[str, Any]) -> float:
    """The training loss of step 1, before anything has changed."""
    recipe["train"] |= {"max_steps": 1, "epochs": 1.0}
    byway.train(recipe)
    return losses(Path(recipe["output"]))[0]["loss"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_run_starts_from_the_tensors_of_an_adapter(method: Any, make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    start = adapter_of(llama_dir, tmp_path / "start", method)
    recipe = make_recipe(method={})
    recipe["method"] = {"start": str(start)}
    found = byway.Recipe.from_dict(recipe)
    assert type(found.method[0]) is type(method)
    assert byway.Recipe.from_dict(found.to_dict()) == found

    recipe["train"] |= {"max_steps": 1, "learning_rate": 1e-30}
    run = byway.train(recipe)
    before, after = (_tensors(path) for path in (start, run.directory / "adapter"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(directory.glob("*.safetensors")))


def test_it_goes_on_from_an_adapter_of_peft(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama_dir),
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    )
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
    theirs.save_pretrained(tmp_path / "theirs")
    recipe = make_recipe(method={})
    recipe["method"] = {"adapter_name_or_path": str(tmp_path / "theirs")}
    (method,) = byway.Recipe.from_dict(recipe).method
    assert isinstance(method, byway.LoRA)
    assert (method.rank, method.alpha) == (2, 6.0)
    recipe["train"] |= {"rows_per_step": 24, "micro_batch_tokens": 4096}
    ids = AutoTokenizer.from_pretrained(llama_dir)([row["text"] for row in text_rows(24)], add_special_tokens=False)["input_ids"]
    loss = first_loss(recipe)
    # the mean over all predicted tokens, a text followed by </s>
    with torch.no_grad():
        summed, count = 0.0, 0
        for row in ids:
            batch = torch.tensor([[*row, 2]])
            summed += float(theirs(batch, labels=batch).loss) * len(row)
            count += len(row)
    assert loss == pytest.approx(summed / count, rel=1e-4)


def test_fields_given_beside_a_start_replace_those_of_the_adapter(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    start = adapter_of(llama_dir, tmp_path / "start", byway.LoRA(rank=3, targets=["q_proj"]))
    recipe = make_recipe(method={})
    recipe["method"] = {"start": str(start), "name": "lora", "dropout": 0.25, "plus_ratio": 4}
    (method,) = byway.Recipe.from_dict(recipe).method
    assert (method.rank, method.dropout, method.plus_ratio) == (3, 0.25, 4)  # type: ignore[attr-defined]
    recipe["train"] |= {"max_steps": 1}
    byway.train(recipe)
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_dropout"]) == (3, 0.25)


def test_a_start_that_cannot_be_is_refused_by_name(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    start = adapter_of(llama_dir, tmp_path / "start", byway.LoRA(rank=3, targets=["q_proj"]))
    recipe = make_recipe(method={})

    def refused(message: str, **method: Any) -> None:
        with pytest.raises(BywayError, match=message):
            byway.train(recipe | {"method": method})
        assert not Path(recipe["output"]).exists()

    refused("the adapter in .* is a lora", name="dora", start=str(start))
    refused("wrong shapes", start=str(start), rank=4)
    refused("no such directory", start=str(tmp_path / "nowhere"))
    refused("there is no directory", name="lora", start=str(tmp_path / "nowhere"))
    refused("must be the directory of an adapter", start=3)
    other = tmp_path / "other"
    model, _ = byway.load_base(llama_dir)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(other)
    (other / "tokenizer.json").write_bytes((llama_dir / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_bytes((llama_dir / "tokenizer_config.json").read_bytes())
    recipe["base"]["model"] = str(other)
    refused("made for another base", start=str(start))


def test_a_start_inside_the_run_that_would_be_replaced_is_refused(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe()
    recipe["train"] |= {"max_steps": 1}
    run = byway.train(recipe)
    with pytest.raises(ConfigError, match="inside the run that --overwrite replaces"):
        byway.train(recipe | {"method": {"start": str(run.directory / "adapter")}}, overwrite=True)
    assert (run.directory / "adapter").is_dir()


def test_an_interrupted_run_that_started_from_an_adapter_resumes(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    from tests.train.conftest import assert_same_run, interrupt_at

    start = adapter_of(llama_dir, tmp_path / "start", byway.LoRA(rank=3, targets=["q_proj"], dropout=0.1))
    whole, parts = make_recipe("whole"), make_recipe("parts")
    for recipe in (whole, parts):
        recipe["method"] = {"start": str(start)}
    byway.train(whole)
    with pytest.raises(Stopped):
        byway.train(parts, on_event=interrupt_at(3))
    byway.train(parts, resume=True)
    assert_same_run(Path(whole["output"]), Path(parts["output"]))


# ------------------------------------------------ new tokens


def with_tokens(recipe: dict[str, Any], tmp_path: Path, **method: Any) -> dict[str, Any]:
    rows = [{"text": f"<tool> {row['text']} <end_tool>"} for row in text_rows(24)]
    recipe["data"] |= {"train": str(write_rows(tmp_path / "tools.jsonl", rows))}
    recipe["base"] |= {"add_tokens": TOKENS}
    recipe["method"] = {"name": "lora", "rank": 2, "targets": ["q_proj"]} | method
    return recipe


def untied_dir(llama_dir: Path, tmp_path: Path, *, tied: bool) -> Path:
    model, tokenizer = byway.load_base(llama_dir)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "base")
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_new_token_starts_as_the_mean_of_what_it_was_split_into(llama_dir: Path) -> None:
    bare, old = byway.load_base(llama_dir)
    model, tokenizer = byway.load_base(llama_dir, add_tokens=["w1 w2", "w3"])
    assert tokenizer is not None
    assert old is not None
    assert tokenizer("w0 w1 w2")["input_ids"][1:] == [len(old)]
    assert tokenizer.convert_tokens_to_ids("w3") == old.convert_tokens_to_ids("w3")
    pieces = old("w1 w2", add_special_tokens=False)["input_ids"]
    assert len(pieces) == 2
    for path in ("model.embed_tokens.weight", "lm_head.weight"):
        weight, other = model.get_parameter(path), bare.get_parameter(path)
        assert len(weight) == max(len(other), len(old) + 1)
        torch.testing.assert_close(weight[len(old)], other[pieces].mean(0))
        torch.testing.assert_close(weight[: len(old)], other[: len(old)], rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_new_tokens_are_trained_saved_merged_and_read_by_peft(
    tied: bool, make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path
) -> None:
    recipe = with_tokens(make_recipe(), tmp_path)
    recipe["base"]["model"] = str(untied_dir(llama_dir, tmp_path, tied=tied))
    run = byway.train(recipe)
    model, tokenizer, _ = find(run.directory).load()
    assert tokenizer is not None
    ids = tokenizer("<tool> w1 w5 <end_tool>", return_tensors="pt")["input_ids"]
    new = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids[0, [0, -1]].tolist() == new[:2]
    bare, _ = byway.load_base(recipe["base"]["model"], add_tokens=TOKENS)
    with torch.no_grad():
        trained = model(ids).logits
        assert (trained - bare(ids).logits).abs().max() > 1e-3
    moved = {name: tensor for name, tensor in _tensors(run.directory / "adapter").items() if "trainable_tokens_delta" in name}
    assert len(moved) == (1 if tied else 2)
    for rows in moved.values():
        assert rows.shape[0] == len(TOKENS)

    theirs = AutoModelForCausalLM.from_pretrained(recipe["base"]["model"])
    theirs.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    read = peft.PeftModel.from_pretrained(theirs, run.directory / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, trained, rtol=1e-4, atol=1e-5)

    byway.merge_files(recipe["base"]["model"], run.directory, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("<tool> w1 w5 <end_tool>")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "full"])
def test_other_methods_that_have_rows_train_them(name: str, make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = with_tokens(make_recipe(), tmp_path)
    recipe["method"] = {"name": name}
    recipe["train"] |= {"max_steps": 2}
    run = byway.train(recipe)
    model, _, (adapter,) = find(run.directory).load()
    assert model.get_input_embeddings().weight.shape[0] >= 64
    assert any("embed_tokens" in key for key, _ in adapter.named_parameters())


def test_a_method_that_cannot_train_rows_is_refused(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = with_tokens(make_recipe(), tmp_path)
    recipe["method"] = {"name": "ia3"}
    with pytest.raises(ConfigError, match=r"base\.add_tokens needs a method that trains the rows of new tokens; ia3 does not"):
        byway.train(recipe)


def test_a_second_run_starts_from_the_first_and_adds_a_token(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = with_tokens(make_recipe("first"), tmp_path)
    recipe["train"] |= {"max_steps": 2}
    first = byway.train(recipe)
    second = recipe | {"method": {"start": str(first.directory / "adapter")}, "output": str(tmp_path / "second")}
    second["base"] = recipe["base"] | {"add_tokens": TOKENS}
    run = byway.train(second)
    assert {name: tensor.shape for name, tensor in _tensors(run.directory / "adapter").items()} == {
        name: tensor.shape for name, tensor in _tensors(first.directory / "adapter").items()
    }


def test_a_token_that_fits_into_unused_rows_is_in_the_merged_tokenizer(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    recipe = with_tokens(make_recipe(), tmp_path)
    recipe["base"]["add_tokens"] = TOKENS[:2]  # 62 of the 64 rows are used
    run = byway.train(recipe)
    byway.merge_files(llama_dir, run.directory, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model, own, _ = find(run.directory).load()
    assert own is not None
    ids = tokenizer("<tool> w1 <end_tool>", return_tensors="pt")["input_ids"]
    assert ids.tolist() == own("<tool> w1 <end_tool>", return_tensors="pt")["input_ids"].tolist()
    assert model.get_input_embeddings().weight.shape[0] == 64
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
