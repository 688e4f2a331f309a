"""How a ladder starts: structural pruning by magnitude and Fisher information, and random starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import byway
from byway.errors import ConfigError
from byway.methods import ladder_side_tuning
from tests.methods.ladders import ladders
from tests.tiny import build, inputs


def enlarged(small: Any, big: Any, every: int) -> dict[str, torch.Tensor]:
    """The small Llama inside a big one: its coordinates scattered among zeros, rotated pairs staying pairs."""
    d, e = small.config.hidden_size, small.config.head_dim
    state = {k: torch.zeros_like(v) for k, v in big.state_dict().items()}

    def spread(n: int, heads: bool) -> torch.Tensor:
        if not heads:
            return every * torch.arange(n) + 1
        half, wide = torch.arange(e // 2) * every + 1, e * every // 2
        return torch.cat([torch.cat([half, half + wide]) + h * e * every for h in range(n // e)])

    for key, value in small.state_dict().items():
        heads_out = any(p in key for p in ("q_proj", "k_proj", "v_proj"))
        rows = torch.arange(len(value)) if "embed" in key or "lm_head" in key else spread(len(value), heads_out)
        if value.ndim == 1:
            state[key][rows] = value
        else:
            state[key][rows[:, None], spread(value.shape[1], "o_proj" in key)] = value
    assert d * every == big.config.hidden_size
    return state


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_pruning_finds_a_small_model_that_is_hidden_in_a_large_one(init: Any) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, head_dim=4, **sizes)).eval()
    big = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=72, head_dim=12, **sizes)).eval()
    big.load_state_dict(enlarged(small, big, 3))
    before = {k: v.clone() for k, v in big.state_dict().items()}
    flags = [p.requires_grad for p in big.parameters()]
    ids = torch.randint(3, 50, (3, 6))
    method = byway.LadderSideTuning(reduction=3, init=init)
    byway.attach(big, method, batches=[{"input_ids": ids, "labels": ids}])
    (ladder,) = ladders(big)
    for index, block in ladder.side_block.items():
        for name, tensor in small.model.layers[int(index)].state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor), (index, name)
    assert torch.equal(ladder.final_side_layer_norm.weight, small.model.norm.weight)
    assert all(torch.equal(v, before[k]) for k, v in byway.base_state_dict(big).items())
    byway.detach(big)
    assert [p.requires_grad for p in big.parameters()] == flags


def test_fisher_is_the_sum_of_squared_gradients_of_single_rows() -> None:
    from byway.methods.ladder.importance import fisher

    model, x = build("bert"), inputs("bert", rows=3)
    batch = {**x, "labels": torch.tensor([0, 2, 1])}
    module = model.bert.encoder.layer[1].intermediate.dense
    found = fisher(model, [module, model.bert.embeddings.word_embeddings], [batch, batch])(module)
    expected = torch.zeros_like(module.weight, dtype=torch.float64)
    for _ in range(2):
        for i in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(x["input_ids"][i : i + 1]).logits, batch["labels"][i : i + 1]).backward()
            expected += module.weight.grad.double() ** 2
    assert (found - expected).abs().max() <= 1e-6 * expected.max()


def test_fisher_without_labels_says_so() -> None:
    model = build("llama")
    for batches in (None, [], [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]):
        with pytest.raises(ConfigError, match="needs calibration batches with labels"):
            byway.attach(model, byway.LadderSideTuning(init="fisher"), batches=batches)
    assert byway.adapters(model) == {}


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_loading_needs_no_batches_and_prunes_nothing(init: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("llama"), inputs("llama")
    ids = x["input_ids"]
    adapter = byway.attach(model, byway.LadderSideTuning(init=init, drop=[0]), batches=[{"input_ids": ids, "labels": ids}])
    out = model(**x).logits
    adapter.save(tmp_path / "ladder")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a start is computed for tensors that the file fills")

    monkeypatch.setattr(ladder_side_tuning.Pruning, "fill", never)
    monkeypatch.setattr(ladder_side_tuning, "fisher", never)
    other = build("llama")
    loaded = byway.load(other, tmp_path / "ladder")
    assert torch.equal(other(**x).logits, out)
    assert loaded.method == adapter.method


def test_the_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = build("llama")
        torch.manual_seed(seed)
        return [p.detach() for _, p in byway.attach(model, byway.LadderSideTuning(init="random")).named_parameters()]

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_samplers_start_small_and_gates_at_a_half() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4))
    byway.attach(model, byway.LadderSideTuning())
    (ladder,) = ladders(model)
    for linear in (ladder.side_first_downsample, *ladder.side_downsamples.values(), ladder.side_final_upsample):
        assert 0.0095 < float(linear.weight.detach().std()) < 0.0105
        assert not linear.bias.any()
    assert not ladder.side_gate_params.any()
