"""LoRA against numbers nobody here wrote: golden cases, loralib, HF peft, and the papers' formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import byway
from byway.methods.lora import LoRA
from byway.methods.lowrank.sides import BlockLoRA, LowRank
from tests.methods.lora_sides import relative
from tests.tiny import build, inputs, randomize

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())

FORWARD, GRADIENT = 2e-6, 1e-5  # the golden file's tolerances

RELATIVE = 1e-6  # float32 against an independent formula, reliability I5


def m(spec: str) -> Tensor:
    """``M(a,b,p,q,m,c)`` of the golden file: ((i·p + j·q) mod m − c) / 10."""
    a, b, p, q, mod, c = (int(x) for x in spec[2 : spec.index(")")].split(","))
    return torch.tensor([[(((i * p + j * q) % mod) - c) / 10 for j in range(b)] for i in range(a)])


def linear() -> tuple[nn.Sequential, Tensor]:
    case = GOLDEN["inputs"]
    module = nn.Linear(6, 4)
    module.weight.data.copy_(m(case["W"]))
    module.bias.data.copy_(torch.tensor(case["bias"]))
    return nn.Sequential(module), m(case["X"])


def only(adapter: byway.Adapter) -> LowRank:
    ((_, side),) = adapter.side_paths()
    assert isinstance(side, LowRank)
    return side


def put(side: LowRank, a: Tensor, b: Tensor) -> None:
    side.lora_A.data.copy_(a.reshape(side.lora_A.shape))
    side.lora_B.data.copy_(b.reshape(side.lora_B.shape))


def close(found: Tensor, expected: Any, tolerance: float) -> bool:
    return bool((found - torch.as_tensor(expected, dtype=found.dtype)).abs().max() <= tolerance)


# ---- golden cases


def test_golden_linear_forward_gradients_and_merge() -> None:
    model, x = linear()
    adapter = byway.attach(model, LoRA(rank=2, alpha=3, targets=["0"]))
    side, case = only(adapter), GOLDEN["lora_linear"]
    put(side, m(GOLDEN["inputs"]["A"]), m(GOLDEN["inputs"]["B"]))
    y = model(x)
    assert close(y, case["y"], FORWARD)
    (0.5 * y.pow(2).sum()).backward()
    assert side.lora_A.grad is not None and close(side.lora_A.grad, case["dA"], GRADIENT)
    assert side.lora_B.grad is not None and close(side.lora_B.grad, case["dB"], GRADIENT)
    byway.merge(model)
    assert close(model[0].weight, case["merged_W"], FORWARD)


def test_golden_fused_map_with_enabled_blocks() -> None:
    case = GOLDEN["lora_merged_linear"]
    model = nn.Sequential(nn.Linear(3, 6, bias=False))
    before = model[0].weight.detach().clone()
    adapter = byway.attach(model, LoRA(rank=1, alpha=1, targets=["0"], blocks=tuple(bool(x) for x in case["enable"])))
    put(only(adapter), m(case["A"]), m(case["B"]))
    x = torch.randn(5, 3)
    y = model(x)
    assert close(y, x @ (before + torch.tensor(case["delta_W"])).T, 1e-6)
    byway.merge(model)
    assert close(model[0].weight - before, case["delta_W"], FORWARD)


def test_golden_embedding() -> None:
    case = GOLDEN["lora_embedding"]
    model = nn.Sequential(nn.Embedding(5, 4))
    model[0].weight.data.copy_(m(case["weight"]))
    put(only(byway.attach(model, LoRA(rank=2, alpha=3, targets=["0"]))), m(case["A"]), m(case["B"]))
    ids = torch.tensor(case["ids"])
    assert close(model(ids), case["y"], FORWARD)
    byway.merge(model)
    assert close(model(ids), case["y"], FORWARD)


def test_golden_convolution_as_peft_defines_it() -> None:
    case = GOLDEN["lora_conv2d_peft"]
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False))
    model[0].weight.data.copy_(m(GOLDEN["lora_conv2d_loralib"]["weight"]).reshape(3, 2, 2, 2))
    put(only(byway.attach(model, LoRA(rank=2, alpha=3, targets=["0"]))), m(case["A"]), m(case["B"]))
    x = m(GOLDEN["lora_conv2d_loralib"]["x"]).reshape(1, 2, 3, 3)
    assert close(model(x)[0], torch.tensor(case["y"]).reshape(model(x)[0].shape), FORWARD)
    before = model[0].weight.detach().clone()
    byway.merge(model)
    assert close(model[0].weight - before, case["delta_W"], FORWARD)


@pytest.mark.parametrize("init", ["pissa", "pissa_fast"])
def test_golden_pissa_leaves_output_and_base_as_they_were(init: Any) -> None:
    model, x = linear()
    before, y = model[0].weight.detach().clone(), model(x).detach()
    side = only(byway.attach(model, LoRA(rank=2, alpha=3, targets=["0"], init=init)))
    case = GOLDEN["pissa_linear"]
    held = side.scale * side.lora_B @ side.lora_A
    assert close(held, case["sBA"], GRADIENT)
    assert close(before - held, case["W_res"], GRADIENT)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, before)
    randomize(side.named_parameters(), scale=0.3)
    exported = side.export()
    plain = side.exported_alpha / side.exported_rank * exported["lora_B.weight"] @ exported["lora_A.weight"]
    assert exported["lora_A.weight"].shape == (4, 6)
    assert relative(x @ plain.T, model(x) - y) < GRADIENT


def test_golden_rank_stabilized_scale() -> None:
    case = GOLDEN["rslora_scaling"]
    for stabilized, expected in ((False, case["plain"]), (True, case["rslora"])):
        model = nn.Sequential(nn.Linear(8, 8))
        side = only(byway.attach(model, LoRA(rank=case["r"], alpha=case["alpha"], targets=["0"], rank_stabilized=stabilized)))
        assert side.scale == expected


# ---- the formula, in float64, on sizes drawn from a printed seed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_equal_the_papers_formula(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    tolerance = 1e-12 if dtype == torch.float64 else RELATIVE
    for _ in range(10):
        inside, outside, batch = (int(n) for n in rng.integers(1, 300, 3))
        rank = int(rng.integers(1, min(inside, outside) + 1))
        alpha = float(rank * rng.choice([0.125, 0.5, 1.0, 8.0]))
        model = nn.Sequential(nn.Linear(inside, outside, dtype=dtype))
        side = only(byway.attach(model, LoRA(rank=rank, alpha=alpha, targets=["0"])))
        assert side.lora_A.dtype == dtype
        a, b, x, g = (rng.standard_normal(s) for s in ((rank, inside), (outside, rank), (batch, inside), (batch, outside)))
        put(side, torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
        a, b = side.lora_A.detach().double().numpy(), side.lora_B.detach().double().numpy()
        x, g = (torch.tensor(t, dtype=dtype).double().numpy() for t in (x, g))
        w, bias = model[0].weight.detach().double().numpy().copy(), model[0].bias.detach().double().numpy()
        scale = alpha / rank
        y = model(torch.tensor(x, dtype=dtype))
        y.backward(torch.tensor(g, dtype=dtype))
        assert relative(y.detach(), torch.tensor(x @ (w + scale * b @ a).T + bias)) < tolerance
        assert side.lora_A.grad is not None and relative(side.lora_A.grad, torch.tensor(scale * b.T @ g.T @ x)) < 10 * tolerance
        assert side.lora_B.grad is not None and relative(side.lora_B.grad, torch.tensor(scale * g.T @ x @ a.T)) < 10 * tolerance
        byway.merge(model)
        assert relative(model[0].weight.detach(), torch.tensor(w + scale * b @ a)) < tolerance


def test_parameter_count_is_rank_times_in_plus_out(seed: int) -> None:
    model = build("llama")
    adapter = byway.attach(model, LoRA(rank=5, targets=["q_proj", "v_proj", "down_proj"]))
    assert adapter.num_parameters == 3 * 5 * ((32 + 32) + (32 + 16) + (64 + 32))


def test_published_parameter_count_of_roberta_base_from_shapes_alone() -> None:
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))
    assert byway.attach(model, LoRA(rank=8, targets=["query", "value"])).num_parameters == 294_912


# ---- loralib


def test_equals_loralib_on_linear_embedding_and_fused_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        inside, rank, alpha = int(rng.integers(4, 60)), int(rng.integers(1, 4)), float(rng.integers(1, 9))
        outside = 3 * int(rng.integers(2, 20))
        enabled = [bool(x) for x in rng.integers(0, 2, 3)]
        enabled[int(rng.integers(3))] = True
        theirs = [
            loralib.Linear(inside, outside, r=rank, lora_alpha=alpha, merge_weights=False),
            loralib.MergedLinear(inside, outside, r=rank, lora_alpha=alpha, enable_lora=enabled, merge_weights=False),
            loralib.Embedding(outside, inside, r=rank, lora_alpha=alpha, merge_weights=False),
        ]
        for layer in theirs:
            layer.lora_A.data.normal_()
            layer.lora_B.data.normal_()
            blocks = tuple(enabled) if isinstance(layer, loralib.MergedLinear) else None
            bare = nn.Embedding(outside, inside) if isinstance(layer, loralib.Embedding) else nn.Linear(inside, outside)
            bare.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" not in k})
            ours = nn.Sequential(bare)
            side = only(byway.attach(ours, LoRA(rank=rank, alpha=alpha, targets=["0"], blocks=blocks)))
            put(side, layer.lora_A.data, layer.lora_B.data)
            x = torch.randint(0, outside, (7,)) if isinstance(layer, loralib.Embedding) else torch.randn(7, inside)
            y = layer(x)
            assert relative(ours(x).detach(), y.detach()) < RELATIVE
            y.pow(2).sum().backward()
            ours(x).pow(2).sum().backward()
            for mine, other in ((side.lora_A, layer.lora_A), (side.lora_B, layer.lora_B)):
                assert mine.grad is not None and relative(mine.grad, other.grad.reshape(mine.shape)) < 1e-5
    assert isinstance(side, LowRank) and BlockLoRA is not None


# ---- starts, dropout, odd convolutions, ties


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 1 / (3 * 400) ** 0.5), ("gaussian", 1 / 16)])
def test_starting_factors_have_the_documented_spread_and_follow_the_seed(init: Any, deviation: float) -> None:
    def start() -> LowRank:
        torch.manual_seed(3)
        return only(byway.attach(nn.Sequential(nn.Linear(400, 300)), LoRA(rank=16, targets=["0"], init=init)))

    side = start()
    assert abs(float(side.lora_A.detach().std()) / deviation - 1) < 0.05
    assert not side.lora_B.any()
    assert torch.equal(side.lora_A, start().lora_A)


def test_dropout_acts_on_the_branch_only_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(50, 20))
    side = only(byway.attach(model, LoRA(rank=4, alpha=4, dropout=0.5, targets=["0"])))
    randomize(side.named_parameters())
    x = torch.randn(64, 50)
    model.train()
    torch.manual_seed(1)
    dropped = model(x)
    torch.manual_seed(1)
    mask = nn.functional.dropout(x, 0.5)
    assert close(
        dropped,
        model[0].weight.new_tensor(0) + nn.functional.linear(x, model[0].weight, model[0].bias) + mask @ side.lora_A.T @ side.lora_B.T,
        1e-5,
    )
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_convolutions_of_every_kind_merge_exactly(dims: int, padding_mode: str) -> None:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(kind(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode=padding_mode))
    adapter = byway.attach(model, LoRA(rank=3, targets=["0"], lora_bias=True))
    randomize(adapter.named_parameters())
    x = torch.randn(2, 4, *(9,) * dims)
    unmerged = model(x).detach()
    byway.merge(model)
    assert relative(model(x).detach(), unmerged) < 1e-5


def test_a_grouped_convolution_is_adapted_and_its_merge_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    randomize(byway.attach(model, LoRA(rank=2, targets=["0"])).named_parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(byway.NotMergeable, match="groups"):
        byway.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(byway.TargetError, match="must divide the rank"):
        byway.attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoRA(rank=3, targets=["0"]))


def test_merging_into_one_end_of_a_tie_unties_so_that_the_output_stays() -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, LoRA(rank=4, targets=["embed_tokens"]))
    randomize(adapter.named_parameters())
    unmerged, head = model(**x).logits.detach(), model.lm_head.weight.detach().clone()
    report = byway.merge(model)
    assert relative(model(**x).logits.detach(), unmerged) < 1e-6
    assert torch.equal(model.lm_head.weight, head)
    assert model.config.tie_word_embeddings is False
    assert any("tied" in note for note in report.notes)


def test_a_trained_copy_of_a_tied_head_leaves_the_embedding_alone_and_says_so() -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, LoRA(rank=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    assert any("embed_tokens" in note for note in adapter.notes)
    embedding = model.model.embed_tokens.weight.detach().clone()
    randomize(adapter.named_parameters())
    unmerged = model(**x).logits.detach()
    byway.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert relative(model(**x).logits.detach(), unmerged) < 1e-6


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -4}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 4.0}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": None}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"dropout": 2.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"init": "kaimin"}, "init"),
        ({"bias": False}, "bias"),
        ({"plus_ratio": 0.0}, "plus_ratio"),
        ({"blocks": (False, False)}, "blocks"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(byway.ConfigError, match=named):
        LoRA(**options)


def test_a_rank_that_the_module_cannot_use_is_refused_before_anything_is_touched() -> None:
    model = build("llama")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(byway.TargetError, match=r"rank 17 is more than .*v_proj"):
        byway.attach(model, LoRA(rank=17, targets=["q_proj", "v_proj"]))
    assert [p.requires_grad for p in model.parameters()] == before
    assert byway.adapters(model) == {}


def test_a_method_is_a_value() -> None:
    method = LoRA(rank=4, targets=["q_proj"], rank_pattern={"q_proj": 2})
    assert hash(method) == hash(LoRA(rank=4, targets=("q_proj",), rank_pattern={"q_proj": 2}))
    with pytest.raises(TypeError):
        method.rank_pattern["q_proj"] = 3  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
