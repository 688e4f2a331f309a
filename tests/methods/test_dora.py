"""DoRA against the golden case, HF peft, and the paper's formula in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway
from byway.errors import ConfigError, TargetError
from byway.methods.dora import DoRA
from byway.methods.lowrank.magnitude import Decomposed, row_norms
from tests.methods.test_lora import FORWARD, GOLDEN, GRADIENT, close, linear, m, put, relative
from tests.tiny import build, inputs, randomize


def only(adapter: byway.Adapter) -> Decomposed:
    ((_, side),) = adapter.side_paths()
    assert isinstance(side, Decomposed)
    return side


def plain_norms(side: Decomposed) -> Tensor:
    """n (out,) by forming V."""
    return row_norms(side.directions().detach())


def grown(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter


def test_golden_forward_gradients_and_merge() -> None:
    model, x = linear()
    side, case = only(byway.attach(model, DoRA(rank=2, alpha=3, targets=["0"]))), GOLDEN["dora_linear"]
    assert close(side.magnitude.detach(), case["magnitude_init"], FORWARD)
    put(side, m(GOLDEN["inputs"]["A"]), m(GOLDEN["inputs"]["B"]))
    side.magnitude.data.mul_(torch.tensor([1.1, 0.9, 1.0, 1.2]))
    assert close(side.norms(), case["V_row_norms"], FORWARD)
    y = model(x)
    assert close(y, case["y"], FORWARD)
    (0.5 * y.pow(2).sum()).backward()
    for parameter, name in ((side.magnitude, "dm"), (side.lora_A, "dA"), (side.lora_B, "dB")):
        assert close(grown(parameter.grad), case["norm_detached"][name], GRADIENT)
    byway.merge(model)
    assert close(model[0].weight, case["W_eff"], FORWARD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_equal_the_papers_formula(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    for _ in range(10):
        inside, outside, batch = (int(n) for n in rng.integers(2, 200, 3))
        rank = int(rng.integers(1, min(inside, outside) + 1))
        model = nn.Sequential(nn.Linear(inside, outside, dtype=dtype))
        side = only(byway.attach(model, DoRA(rank=rank, alpha=rank / 2, targets=["0"])))
        randomize(side.named_parameters(), scale=0.3)
        x = torch.randn(batch, inside, dtype=dtype)
        y = model(x)
        y.pow(2).sum().backward()
        w, bias = (t.detach().double() for t in (model[0].weight, model[0].bias))
        a, b, mag = (p.detach().double().requires_grad_() for p in (side.lora_A, side.lora_B, side.magnitude))
        v = w + side.scale * b @ a
        expected = x.double() @ (mag[:, None] * v / v.detach().norm(dim=1, keepdim=True)).T + bias
        expected.pow(2).sum().backward()
        assert relative(y, expected) < tolerance
        for mine, theirs in ((side.lora_A, a), (side.lora_B, b), (side.magnitude, mag)):
            assert relative(grown(mine.grad), grown(theirs.grad)) < 20 * tolerance
        byway.merge(model)
        assert relative(model[0].weight, mag[:, None] * v / v.norm(dim=1, keepdim=True)) < tolerance


@pytest.mark.parametrize("make", [lambda: nn.Linear(96, 64), lambda: nn.Embedding(90, 40), lambda: nn.Conv2d(6, 24, 3)])
@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_norms_without_forming_the_weight_equal_the_plain_ones(make: Any, init: Any, seed: int) -> None:
    model = nn.Sequential(make())
    if init != "kaiming" and not isinstance(model[0], nn.Linear):
        with pytest.raises(TargetError, match="linear maps only"):
            byway.attach(model, DoRA(rank=6, targets=["0"], init=init))
        return
    side = only(byway.attach(model, DoRA(rank=6, targets=["0"], init=init)))
    for _ in range(5):
        with torch.no_grad():
            for parameter in side.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        assert ((side.norms() - plain_norms(side)) / plain_norms(side)).abs().max() < 1e-6


def test_a_base_that_is_loaded_or_written_later_gets_its_own_norms() -> None:
    model, x = linear()
    side = only(byway.attach(model, DoRA(rank=2, targets=["0"])))
    randomize(side.named_parameters(), scale=0.3)
    model(x)
    model.load_state_dict({"0.weight": torch.randn(4, 6), "0.bias": torch.zeros(4)})
    assert relative(side.norms(), plain_norms(side)) < 1e-6
    model[0].weight.data.mul_(3)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert relative(side.norms(), plain_norms(side)) < 1e-6
    assert relative(copy.deepcopy(side).norms(), plain_norms(side)) < 1e-6


def test_rows_of_zeros_stay_finite_change_nothing_at_attach_and_can_learn() -> None:
    model, x = linear()
    model[0].weight.data[1].zero_()
    before = model(x).detach()
    side = only(byway.attach(model, DoRA(rank=2, targets=["0"])))
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD(side.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(x)
        y.sum().backward()
        assert all(bool(grown(p.grad).isfinite().all()) for p in side.parameters())
        optimizer.step()
    assert (model(x) - before)[:, 1].abs().max() > 1e-3
    y = model(x).detach()
    byway.merge(model)
    assert close(model(x), y, 1e-5)


def test_columns_of_zeros_of_an_embedding_stay_finite() -> None:
    model = nn.Sequential(nn.Embedding(7, 5))
    model[0].weight.data[:, 2].zero_()
    before = model(torch.arange(7)).detach()
    side = only(byway.attach(model, DoRA(rank=2, targets=["0"])))
    y = model(torch.arange(7))
    assert torch.equal(y, before)
    y.sum().backward()
    assert all(bool(grown(p.grad).isfinite().all()) for p in side.parameters())


def test_magnitude_and_output_move_over_small_steps_beside_a_bfloat16_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16, bias=False))
    side = only(byway.attach(model, DoRA(rank=4, targets=["0"])))
    assert side.magnitude.dtype == torch.float32
    x = torch.randn(64, 64).bfloat16()
    start, seen = model(x).detach().float(), []
    for step in range(
        1, 31
    ):  # each moves a length by a fifth of the distance of two bfloat16 numbers, at which m/n in bfloat16 stands still
        before = side.magnitude.detach().clone()
        with torch.no_grad():
            side.magnitude.mul_(1.001)
        assert not bool((side.magnitude == before).any())
        assert not bool((side.ratios()[0] == 0).any())
        if step % 10 == 0:
            y = model(x).detach().float()
            seen.append(float((y.abs().sum() - start.abs().sum()) / start.abs().sum()))
    assert seen == pytest.approx([1.001**k - 1 for k in (10, 20, 30)], rel=0.1)
    change, _ = side.ratios()
    assert relative(change, torch.full((64,), 1.001**30 - 1)) < 1e-4
    model(x).float().pow(2).mean().backward()
    assert grown(side.magnitude.grad).abs().min() > 0


def test_with_dropout_both_corrections_see_the_dropped_input() -> None:
    model, x = linear()
    side = only(byway.attach(model, DoRA(rank=2, alpha=3, targets=["0"], dropout=0.5)))
    randomize(side.named_parameters(), scale=0.5)
    model.train()
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    dropped = F.dropout(x, 0.5)
    weight, ratio = model[0].weight, side.magnitude / plain_norms(side)
    expected = model[0].bias + x @ weight.T + (ratio - 1) * (dropped @ weight.T) + ratio * (1.5 * dropped @ side.lora_A.T @ side.lora_B.T)
    assert relative(y, expected) < 1e-6
    model.eval()
    assert relative(model(x), x @ (ratio[:, None] * (weight + 1.5 * side.lora_B @ side.lora_A)).T + model[0].bias) < 1e-6


def test_beside_another_adapter_each_adds_its_own_change_of_the_frozen_weight(seed: int) -> None:
    deltas, (model, x) = [], linear()
    bare = model(x).detach()
    for name, method in (("one", byway.LoRA(rank=2, targets=["0"])), ("two", DoRA(rank=2, targets=["0"]))):
        randomize(byway.attach(model, method, name).named_parameters(), scale=0.4)
    for names in (["one"], ["two"]):
        byway.activate(model, names)
        deltas.append(model(x).detach() - bare)
    byway.activate(model, ["one", "two"])
    assert relative(model(x), bare + deltas[0] + deltas[1]) < 1e-6


def test_parameter_counts_are_rank_times_in_plus_out_plus_out() -> None:
    adapter = byway.attach(build("llama"), DoRA(rank=5, targets=["q_proj", "v_proj", "down_proj"]))
    assert adapter.num_parameters == 3 * (5 * ((32 + 32) + (32 + 16) + (64 + 32)) + 32 + 16 + 32)


def test_published_parameter_count_of_llama_7b_from_shapes_alone() -> None:
    counts = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
    with torch.device("meta"):
        model = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in counts.items()})
    adapter = byway.attach(model, DoRA(rank=32, targets=list(counts)))
    assert 32 * adapter.num_parameters == 56_098_816 + 876_544


# ---- HF peft


CASES: dict[str, tuple[str, list[str]]] = {
    "grouped queries": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "Conv1D": ("gpt2", ["c_attn", "c_fc"]),
    "embedding": ("qwen2", ["embed_tokens", "q_proj"]),
    "encoder": ("bert", ["query", "value"]),
    "encoder-decoder": ("t5", ["q", "v"]),
    "convolution": ("vit", ["projection", "q_proj"]),
}


def both(which: str, **more: Any) -> tuple[nn.Module, byway.Adapter, nn.Module, dict[str, Any]]:
    family, targets = CASES[which]
    ours, bare = build(family), build(family)
    adapter = byway.attach(ours, DoRA(rank=3, alpha=7, targets=targets, modules_to_save="none"))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=True, fan_in_fan_out=family == "gpt2", **more)
    return ours, adapter, peft.get_peft_model(bare, config).eval(), inputs(family)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", CASES)
def test_equals_peft_in_outputs_and_gradients(which: str) -> None:
    ours, adapter, theirs, x = both(which)
    peft_own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs, g = [], torch.Generator().manual_seed(11)
    for site, side in adapter.side_paths():
        own = dict(side.named_parameters())
        for name, there in side.peft_names.items():
            if name in own:
                leaf, _, rest = (there if name != "magnitude" else f"{there}.weight").partition(".")
                pairs.append((name, own[name], peft_own.pop(f"base_model.model.{site.path}.{leaf}.default{'.' + rest if rest else ''}")))
    assert not peft_own and pairs
    for name, mine, other in pairs:
        assert name != "magnitude" or relative(mine, other.reshape(mine.shape)) < 1e-6
        values = 0.2 * torch.randn(mine.shape, generator=g) + (1.0 if name == "magnitude" else 0.0)
        mine.data.copy_(values)
        other.data.copy_(values.reshape(other.shape))
    y, expected = ours(**x).logits, theirs(**x).logits
    assert relative(y, expected) < 2e-6
    y.pow(2).mean().backward()
    expected.pow(2).mean().backward()
    for _, mine, other in pairs:
        assert float((grown(mine.grad) - grown(other.grad).reshape(mine.shape)).norm()) <= 2e-5 * float(grown(other.grad).norm()) + 1e-9
    assert adapter.num_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", CASES)
def test_peft_loads_what_we_write_and_we_load_what_peft_writes(which: str, tmp_path: Path) -> None:
    ours, adapter, theirs, x = both(which)
    randomize(adapter.named_parameters())
    adapter.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(build(CASES[which][0]), tmp_path / "ours").eval()
    assert close(loaded(**x).logits, ours(**x).logits, 1e-5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(CASES[which][0])
    back = byway.load(again, tmp_path / "theirs")
    assert isinstance(back.method, DoRA)
    assert close(again(**x).logits, theirs(**x).logits, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weight_is_written_as_dora_of_twice_the_rank(init: Any, tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    bare = model(**x).logits.detach()
    adapter = byway.attach(model, DoRA(rank=3, targets=["q_proj"], init=init))
    assert torch.equal(model(**x).logits, bare)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "a").eval()
    assert close(loaded(**x).logits, model(**x).logits, 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(TargetError, match="2 groups"):
        byway.attach(grouped, DoRA(rank=2, targets=["0"]))
    assert grouped[0].weight.requires_grad
    with pytest.raises(ConfigError, match=r"(?s)rank is 0.*dropout is 1.5.*rho is 0.5"):
        DoRA(rank=0, dropout=1.5, rho=0.5)
    with pytest.raises(ConfigError, match="DoRA has no field 'blocks'"):
        DoRA(blocks=(True, False))  # pyright: ignore[reportCallIssue]


def test_beside_a_4_bit_base_it_equals_dora_beside_the_dequantized_weight() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from byway.core.weights import dense

    torch.manual_seed(0)
    packed = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
    model = nn.Sequential(packed.to("cpu"))
    plain = nn.Sequential(nn.Linear(64, 32))
    plain[0].weight.data.copy_(dense(model[0]))
    plain[0].bias.data.copy_(model[0].bias)
    for each in (model, plain):
        randomize(byway.attach(each, DoRA(rank=4, targets=["0"])).named_parameters(), scale=0.3)
    x = torch.randn(5, 64)
    y = model(x)
    assert relative(y, plain(x)) < 1e-5
    byway.merge(model)
    assert type(model[0]) is nn.Linear
    assert relative(model(x), y) < 1e-5
