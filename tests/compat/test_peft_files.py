"""Adapters on embeddings and heads: each library reads what the other writes, and its own files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft as theirs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import byway.compat.peft as ours
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BASES: dict[str, Callable[[], Any]] = {
    "tied head": tiny.llama,
    "own head": lambda: tiny.llama(tie_word_embeddings=False),
    "OPT": tiny.opt,
}
TARGETS = ("embed_tokens", "lm_head", "lm_head q_proj", "embed_tokens q_proj", "embed_tokens lm_head")


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.covering_sample
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("save", ["auto", True, False])
@pytest.mark.parametrize("writer", [ours, theirs], ids=["ours", "theirs"])
def test_both_libraries_load_an_adapter_on_the_vocabulary(
    base: Callable[[], Any], targets: str, dora: bool, save: bool | str, writer: ModuleType, tmp_path: Path, seed: int
) -> None:
    bare = base().eval()
    config = writer.LoraConfig(task_type="CAUSAL_LM", target_modules=targets.split(), r=4, use_dora=dora)
    model = writer.get_peft_model(copy.deepcopy(bare), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    for reader in (ours, theirs):
        found = logits(reader.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(bare)).abs().max() > 1e-2


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("save", ["auto", True, False])
def test_the_same_tensors_are_written_as_by_peft(targets: str, save: bool | str, tmp_path: Path) -> None:
    for library in (ours, theirs):
        model = library.get_peft_model(tiny.llama(), library.LoraConfig(task_type="CAUSAL_LM", target_modules=targets.split()))
        model.save_pretrained(tmp_path / library.__name__, save_embedding_layers=save)
    own, their = (load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in (ours, theirs))
    assert {key: tensor.shape for key, tensor in own.items()} == {key: tensor.shape for key, tensor in their.items()}


def test_trained_tokens_are_rows_of_the_token_embedding_though_there_are_more_positions() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    config = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "trainable_token_indices": [3, 5]}
    model = ours.get_peft_model(base, ours.LoraConfig(**config))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert trained == ["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta.default"]
