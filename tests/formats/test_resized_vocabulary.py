"""peft's files for a resized vocabulary and for trained rows of embeddings and heads: loaded exactly, written so that peft reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import byway
from byway.errors import AdapterError

SEED = 20261130

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Setting .save_embedding_layers.:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]
V, ADDED = 30, 3
IDS = torch.arange(V).reshape(3, 10)
NEW = [V, V + 1]
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "resized": ({}, True),
    "rows": ({"trainable_token_indices": [4, 6]}, False),
    "new rows": ({"trainable_token_indices": NEW}, True),
    "rows of both": ({"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7]}}, False),
    "the same rows of both": ({"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}, False),
    "rows of the head": ({"trainable_token_indices": {"lm_head": [5, 6]}}, False),
    "new rows of both": ({"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}}, True),
    "a head as target": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "copies": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
}


def base(directory: Path, *, tied: bool) -> None:
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=tied, **sizes)).save_pretrained(directory)


def loaded(directory: Path, rows: int, seed: int) -> Any:
    torch.manual_seed(seed)  # the new rows differ from one call to another: only the file can make them equal
    model: Any = LlamaForCausalLM.from_pretrained(directory)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(directory: Path, settings: dict[str, Any], rows: int) -> Any:
    theirs: Any = peft.get_peft_model(loaded(directory, rows, 1), peft.LoraConfig(r=2, **{"target_modules": ["q_proj"]} | settings)).eval()
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return theirs


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_peft_is_loaded_exactly_and_written_so_that_peft_reads_it(case: str, tied: bool, tmp_path: Path) -> None:
    settings, resized = CASES[case]
    base(tmp_path / "base", tied=tied)
    rows = V + ADDED if resized else 0
    theirs = trained(tmp_path / "base", settings, rows)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = loaded(tmp_path / "base", rows, 2)
    bare = logits(ours)
    adapter = byway.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-6)
    adapter.save(tmp_path / "ours")
    again = loaded(tmp_path / "base", rows, 2)
    byway.load(again, tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
    read = peft.PeftModel.from_pretrained(loaded(tmp_path / "base", rows, 3), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read), expected, rtol=1e-5, atol=1e-6)
    with byway.disabled(again):
        torch.testing.assert_close(logits(again), bare, rtol=0, atol=0)
    byway.merge(again)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case, (_, resized) in CASES.items() if resized])
def test_a_base_with_fewer_rows_is_refused_with_the_call_that_resizes_it(case: str, tmp_path: Path) -> None:
    base(tmp_path / "base", tied=True)
    trained(tmp_path / "base", CASES[case][0], V + ADDED).save_pretrained(tmp_path / "theirs")
    model = loaded(tmp_path / "base", 0, 2)
    with pytest.raises(AdapterError) as raised:
        byway.load(model, tmp_path / "theirs")
    assert f"[{V + ADDED}, 16], here it is [{V}, 16]" in raised.value.message
    assert f"resize_token_embeddings({V + ADDED}" in raised.value.hint
    assert not byway.adapters(model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tokens", [[5, 6], {"embed_tokens": [5, 6], "lm_head": [7]}, {"lm_head": [5, 6]}], ids=str)
def test_gradients_of_rows_are_those_of_peft(tokens: Any, tied: bool, tmp_path: Path) -> None:
    base(tmp_path / "base", tied=tied)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    theirs: Any = peft.get_peft_model(loaded(tmp_path / "base", 0, 1), config)
    ours = loaded(tmp_path / "base", 0, 1)
    adapter = byway.attach(ours, byway.LoRA(rank=2, targets=["q_proj"], trained_tokens=tokens))
    for model in (theirs, ours):
        model(IDS, labels=IDS).loss.backward()
    expected = {n.split("model.", 1)[1].split(".token_adapter")[0]: p.grad for n, p in theirs.named_parameters() if "trainable_tokens" in n}
    found = {name.split(".byway")[0]: parameter.grad for name, parameter in adapter.named_parameters() if name.endswith(".rows")}
    assert len(found) == len({id(grad) for grad in expected.values()})
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, next(grad for name, grad in expected.items() if name.endswith(path)), rtol=1e-4, atol=1e-7)


def test_an_untied_head_that_keeps_its_rows_is_named(tmp_path: Path) -> None:
    base(tmp_path / "base", tied=False)
    (note,) = [n for n in byway.LoRA(trained_tokens=[5]).plan(loaded(tmp_path / "base", 0, 1)).notes if "trained_tokens" in n]
    assert "lm_head is not tied" in note
    assert "{model.embed_tokens: [...], lm_head: [...]}" in note
    base(tmp_path / "tied", tied=True)
    assert not [n for n in byway.LoRA(trained_tokens=[5]).plan(loaded(tmp_path / "tied", 0, 1)).notes if "trained_tokens" in n]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"embed": [1]}, "there is no module embed"),
        ({"norm": [1]}, "is a LlamaRMSNorm"),
        ({"lm_head": [V]}, f"has the ids 0 to {V - 1}"),
        ([3, 3], "each at most once"),
    ],
)
def test_rows_that_do_not_exist_are_refused_by_name(tokens: Any, message: str, tmp_path: Path) -> None:
    base(tmp_path / "base", tied=False)
    with pytest.raises(byway.BywayError, match=message):
        byway.attach(loaded(tmp_path / "base", 0, 1), byway.LoRA(trained_tokens=tokens))


def test_the_head_of_a_file_is_not_written_a_second_time(tmp_path: Path) -> None:
    base(tmp_path / "base", tied=True)
    byway.attach(model := loaded(tmp_path / "base", 0, 1), byway.LoRA(rank=2, trained_tokens=[5])).save(tmp_path / "ours")
    assert [key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if "token_adapter" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert model
