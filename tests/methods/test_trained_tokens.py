"""Trained rows of an embedding whose weight other modules share, or that scales what it looks up: alike wherever the weight is read."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import byway
from byway.core.token_rows import TrainedRows
from tests import tiny, zoo

TOKENS = (0, 1, 3)


def outputs(model: Any, family: str) -> Tensor:
    ids = torch.tensor([[0, 1, 3, 5, 6, 3]])
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("family", ["llama", "t5", "mt5", "bart", "mbart", "marian", "pegasus", "gemma3_text", "gpt2"])
def test_rows_act_as_the_merged_weight_does(family: str) -> None:
    model = zoo.build(family)
    if family in ("bart", "mbart", "marian", "pegasus"):
        model.config.scale_embedding = True
        model = type(model)(model.config).eval()
    plain = outputs(model, family)
    adapter = byway.attach(model, byway.LoRA(rank=2, trained_tokens=TOKENS))
    torch.testing.assert_close(outputs(model, family), plain, rtol=1e-5, atol=1e-6)
    (rows,) = [side for _, side in adapter.side_paths() if isinstance(side, TrainedRows)]
    with torch.no_grad():
        rows.rows.add_(0.3 * torch.randn(rows.rows.shape, generator=torch.Generator().manual_seed(0)))
    moved = outputs(model, family)
    assert (moved - plain).abs().max() > 1e-3
    # by hand: the rows in the one weight that all of them share
    bare, shared = type(model)(model.config).eval(), model.get_input_embeddings().weight
    state = {key: value.clone() for key, value in byway.base_state_dict(model).items()}
    for key, value in byway.base_state_dict(model).items():
        if value.data_ptr() == shared.data_ptr():
            state[key][list(TOKENS)] = rows.rows.detach()
    bare.load_state_dict(state)
    torch.testing.assert_close(moved, outputs(bare, family), rtol=1e-4, atol=1e-5)
    byway.merge(model)
    torch.testing.assert_close(outputs(model, family), moved, rtol=1e-4, atol=1e-5)


def test_rows_of_t5_are_those_of_peft() -> None:
    base = tiny.build("t5").eval()
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, trainable_token_indices=list(TOKENS))
    ).eval()
    adapter = byway.attach(base, byway.LoRA(rank=2, trained_tokens=TOKENS))
    (rows,) = [side for _, side in adapter.side_paths() if isinstance(side, TrainedRows)]
    drawn = torch.randn(rows.rows.shape, generator=torch.Generator().manual_seed(1))
    found: list[nn.Parameter] = [p for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name]
    assert found
    with torch.no_grad():
        rows.rows.copy_(drawn)
        for parameter in {id(p): p for p in found}.values():
            parameter.copy_(drawn)
    torch.testing.assert_close(outputs(base, "t5"), outputs(theirs, "t5"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "bert", "roberta", "albert", "deberta", "bart", "whisper", "gpt_neox", "clip_text_model"]
)
def test_rows_are_those_of_words_also_where_there_are_more_positions(family: str) -> None:
    sizes = {"n_positions": 200} if family == "gpt2" else {"max_position_embeddings": 200}
    sizes = {"max_target_positions": 200, "max_source_positions": 200} if family == "whisper" else sizes
    name, own, config = zoo.MODELS[family]
    stem = name.split("For")[0].removesuffix("LMHeadModel").removesuffix("ModelWithProjection")
    model = getattr(transformers, name)(getattr(transformers, own or f"{stem}Config")(**config | sizes)).eval()
    adapter = byway.attach(model, byway.LoRA(rank=2, trained_tokens=TOKENS))
    (found,) = [site.module for site, side in adapter.side_paths() if isinstance(side, TrainedRows)]
    assert found is model.get_input_embeddings()


def test_where_the_embedding_of_words_cannot_be_told_it_is_refused() -> None:
    model = nn.ModuleDict({"one": nn.Embedding(5, 4), "two": nn.Embedding(9, 4), "linear": nn.Linear(4, 4)})
    with pytest.raises(byway.TargetError, match="no embedding that is known to be of tokens"):
        byway.attach(model, byway.LoRA(rank=2, targets=["linear"], trained_tokens=[1]))
    del model["one"]
    byway.attach(model, byway.LoRA(rank=2, targets=["linear"], trained_tokens=[1]))
    vision = zoo.build("vit")
    with pytest.raises(byway.TargetError, match="no embedding that is known to be of tokens"):
        byway.attach(vision, byway.LoRA(rank=2, trained_tokens=[1]))


def test_rows_and_a_trained_bias_of_the_tied_head_add_up() -> None:
    model = zoo.build("bert")
    adapter = byway.attach(model, byway.LoRA(rank=2, trained_tokens=TOKENS, bias="all"))
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    moved = outputs(model, "bert")
    byway.merge(model)
    torch.testing.assert_close(outputs(model, "bert"), moved, rtol=1e-4, atol=1e-5)
