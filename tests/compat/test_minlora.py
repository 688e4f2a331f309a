"""Our minLoRA against the definition in float64, through torch's own parametrizations."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import byway
import byway.compat.minlora as ml


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()


def randomized(model: nn.Module, seed: int = 1) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ml.get_lora_params(model):
            p.copy_(torch.randn(p.shape, generator=g))
    return model.double()


def test_the_update_is_alpha_over_rank_times_ba_and_merges_and_goes_exactly() -> None:
    model, bare, x = net(), net(), torch.randn(3, 6, dtype=torch.float64)
    ml.add_lora(model)
    assert torch.equal(model.double()(x), bare(x))
    randomized(model)
    state = ml.get_lora_state_dict(model)
    assert list(state) == [f"{i}.parametrizations.weight.0.lora_{f}" for i in (0, 2) for f in "AB"]
    for i in (0, 2):
        a, b = (state[f"{i}.parametrizations.weight.0.lora_{f}"] for f in "AB")
        bare[i].weight.data += 1 / 4 * b @ a
    out = model(x)
    torch.testing.assert_close(out, bare(x))
    ml.disable_lora(model)
    assert torch.equal(model(x), net()(x))
    ml.enable_lora(model)
    twin = copy.deepcopy(model)
    ml.merge_lora(twin)
    torch.testing.assert_close(twin(x), out)
    ml.remove_lora(model)
    assert torch.equal(model(x), net()(x)) and list(model.state_dict()).sort() == list(bare.state_dict()).sort()


def test_of_several_sets_one_is_selected_and_a_wrong_one_refused() -> None:
    model, x = net(), torch.randn(3, 6, dtype=torch.float64)
    ml.add_lora(model)
    outs, states = [], []
    for seed in (1, 2):
        randomized(model, seed)
        outs.append(model(x))
        states.append({k: v.clone() for k, v in ml.get_lora_state_dict(model).items()})
    ml.load_multiple_lora(model, states)
    for index in (0, 1):
        torch.testing.assert_close(ml.select_lora(model, index)(x), outs[index])
    with pytest.raises(byway.AdapterError, match="no LoRA number 2"):
        ml.select_lora(model, 2)
    with pytest.raises(byway.AdapterError, match="missing"):
        ml.load_multiple_lora(model, [{}])


def test_tied_head_and_embedding_share_one_update() -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    model = nn.Sequential(embedding, head)
    make = ml.LoRAParametrization
    ml.add_lora(
        model, {nn.Linear: {"weight": partial(make.from_linear, rank=2)}, nn.Embedding: {"weight": partial(make.from_embedding, rank=2)}}
    )
    ml.tie_weights(head, embedding)
    randomized(model)
    assert torch.equal(embedding.weight, head.weight)
    ml.untie_weights(head, embedding)
    assert torch.equal(embedding.weight, head.weight)
    randomized(model, 5)
    assert not torch.equal(embedding.weight, head.weight)


def test_names_that_match_nothing_are_refused_and_a_merge_has_no_dropout() -> None:
    with pytest.raises(byway.TargetError, match="contains nine"):
        ml.add_lora_by_name(net(), ["nine"])
    model = net()
    ml.add_lora_by_name(model, ["2"], {nn.Linear: {"weight": partial(ml.LoRAParametrization.from_linear, rank=2, lora_dropout_p=0.5)}})
    randomized(model)
    expected = model.eval()[2].weight.detach().clone()
    ml.merge_lora(model.train())
    assert torch.equal(model[2].weight, expected)


@pytest.mark.parametrize("make", [ml.LoRAParametrization.from_linear, ml.LoRAParametrization.from_embedding])
def test_a_weight_that_is_no_matrix_is_refused_by_name(make: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"LayerNorm has shape \(8,\)"):
        ml.add_lora(model, {nn.LayerNorm: {"weight": make}})
    model = nn.Sequential(nn.Linear(8, 8))
    ml.add_lora(model)
    assert model(torch.randn(8)).shape == (8,)
