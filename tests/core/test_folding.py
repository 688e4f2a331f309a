"""Folding by pieces: the numbers of the whole fold, refusals before the first write, and no method folded as another."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core import folding
from byway.core.folding import folded, pieces, surely_finite
from byway.core.slots import side_paths
from byway.methods.lowrank.sides import LinearLoRA
from byway.workshop.merge.plan import folds
from tests.tiny import build, randomize


@pytest.fixture(params=[1, 100, 1 << 20], ids=["a row", "a few rows", "all rows"])
def numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of a piece."""
    monkeypatch.setattr(folding, "_PIECE", request.param)
    return request.param


def adapted(family: str, method: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, byway.Adapter]:
    model = build(family).to(dtype)
    adapter = byway.attach(model, method)
    randomize(adapter.named_parameters())
    return model, adapter


def sites(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    return [(model.get_submodule(site.path), side) for site, _, side in side_paths(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_pieces_side_by_side_are_the_formula(family: str, dtype: torch.dtype, init: str, numbers: int) -> None:
    method = byway.LoRA(rank=3, alpha=5, targets="all-linear", **({} if init == "default" else {"init": init}))
    model, _ = adapted(family, method, dtype)
    found = [(module, side) for module, side in sites(model) if isinstance(side, LinearLoRA)]  # a trained head is none
    assert len(found) >= 8
    for module, side in found:
        weight: Any = module.weight
        parts = []
        for piece in pieces(module, [side]):
            assert piece.key == "weight" and piece.finite and piece.differs
            assert piece.change() == pytest.approx(float((piece.after - piece.before).abs().max()))
            parts.append((piece.rows, piece.before.clone(), piece.after.clone()))
        rows = min(max(numbers // weight.shape[1], 1), len(weight))
        assert [part.stop - part.start for part, _, _ in parts] == [min(rows, len(weight) - start) for start in range(0, len(weight), rows)]
        assert torch.equal(torch.cat([before for _, before, _ in parts]).to(dtype), weight)
        delta = side.lora_B.detach().double() @ side.lora_A.detach().double()
        if side.start_A is not None:
            delta = delta - side.start_B.double() @ side.start_A.double()
        exact = weight.detach().double() + side.scale * (delta.T if side.transposed else delta)
        own = torch.cat([after for _, _, after in parts])
        assert own.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (own.double() - exact).abs().max() <= (1e-14 if dtype == torch.float64 else 1e-6) * exact.abs().max()
        assert torch.equal(folded(module, [side])["weight"], own)
        assert surely_finite(module, [side])
        assert float((exact - weight.detach().double()).abs().max()) <= side.row_fold().bound() * (1 + 1e-6)


def test_merging_writes_the_pieces_and_reports_the_largest_change(numbers: int) -> None:
    model, _ = adapted("llama", byway.LoRA(rank=3, targets="all-linear"))
    expected = {site.path: folded(model.get_submodule(site.path), [side])["weight"] for site, _, side in side_paths(model)}
    largest = max(float((expected[p] - model.get_submodule(p).weight).abs().max()) for p in expected)
    report = byway.merge(model)
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in expected.items())
    assert report.largest_change == pytest.approx(largest)
    assert set(report.merged) == set(expected)


def test_two_adapters_on_one_map_are_folded_one_after_the_other(numbers: int) -> None:
    model, _ = adapted("llama", byway.LoRA(rank=3, targets=["q_proj"]))
    second = byway.attach(model, byway.LoRA(rank=2, targets=["q_proj"]), name="second")
    randomize(second.named_parameters())
    module = model.model.layers[0].self_attn.q_proj
    both = [side for site, _, side in side_paths(model) if site.path == "model.layers.0.self_attn.q_proj"]
    whole = both[1].fold(both[0].fold({"weight": module.weight.detach()}))["weight"]
    assert torch.equal(torch.cat([piece.after.clone() for piece in pieces(module, both)]), whole)


@pytest.mark.parametrize(
    "method",
    [
        byway.DoRA(rank=2, modules_to_save="none"),
        byway.LoRA(rank=2, lora_bias=True, targets=["q_proj"]),
        byway.LoRA(rank=2, targets=["c_attn"], blocks=(True, False, True)),
        byway.IA3(modules_to_save="none"),
        byway.BitFit(modules_to_save="none"),
        byway.AdaLoRA(modules_to_save="none"),
    ],
    ids=["DoRA", "lora_bias", "blocks", "IA3", "BitFit", "AdaLoRA"],
)
def test_what_is_not_folded_by_rows_is_folded_whole(method: Any, numbers: int) -> None:
    family = "bert" if not isinstance(method, byway.LoRA) else "qwen2" if method.lora_bias else "gpt2"
    model, _ = adapted(family, method)
    assert sites(model)
    for module, side in sites(model):
        assert side.row_fold() is None and not surely_finite(module, [side])
        found = {piece.key: (piece.rows, piece.after) for piece in pieces(module, [side])}
        assert all(rows == slice(None) for rows, _ in found.values())
        assert all(torch.equal(value, folded(module, [side])[key]) for key, (_, value) in found.items())


@pytest.mark.parametrize(("a", "b"), [(float("nan"), 1.0), (float("inf"), 1.0), (1e30, 1e30)], ids=["nan", "infinite", "overflow"])
def test_what_would_not_be_finite_is_refused_before_anything_is_written(a: float, b: float, numbers: int) -> None:
    model, adapter = adapted("llama", byway.LoRA(rank=2, targets="all-linear"))
    before = copy.deepcopy(model.state_dict())
    last: Any = sites(model)[-1][1]
    with torch.no_grad():
        last.lora_A.fill_(a)
        last.lora_B.fill_(b)
    with pytest.raises(byway.AdapterError, match="a weight that is not finite; the model is unchanged"):
        byway.merge(model)
    plain = {key: value for key, value in model.state_dict().items() if "byway" not in key}
    assert all(torch.equal(value, before[key]) for key, value in plain.items())
    assert adapter.name in byway.adapters(model)


def test_a_bound_that_is_too_coarse_costs_a_look_and_refuses_nothing(numbers: int) -> None:
    model, _ = adapted("llama", byway.LoRA(rank=2, targets=["q_proj"]))
    module, side = sites(model)[0]
    with torch.no_grad():  # orthogonal directions: the bound overflows, the product is zero
        side.lora_A.zero_()
        side.lora_B.zero_()
        side.lora_A[0], side.lora_B[:, 1] = 1e30, 1e30
    assert not surely_finite(module, [side])
    assert "its update is exactly zero" in str(byway.merge(model).skipped)


@pytest.mark.parametrize("wrap", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_from_others_is_not_said_to_be_merged(wrap: Any) -> None:
    model = nn.Sequential(OrderedDict(ordinary=nn.Linear(4, 4), computed=wrap(nn.Linear(4, 3))))
    adapter = byway.attach(model, byway.LoRA(rank=2, targets=["ordinary", "computed"]))
    randomize(adapter.named_parameters())
    before = copy.deepcopy(byway.base_state_dict(model))
    with pytest.raises(byway.NotMergeable, match="computed: the weight of ParametrizedLinear is computed from other parameters"):
        byway.merge(model)
    after = byway.base_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_update_of_the_last_rows_alone_is_merged(numbers: int) -> None:
    """What is left out is what changes nowhere, not what does not change in its first piece."""
    model, _ = adapted("llama", byway.LoRA(rank=2, targets=["q_proj"]))
    for _, side in sites(model):
        with torch.no_grad():
            side.lora_B[:-1] = 0
    assert [fold.changed for fold in folds(model)[0]] == [("weight",)] * len(sites(model))
    before = copy.deepcopy(byway.base_state_dict(model))
    report = byway.merge(model)
    assert len(report.merged) == model.config.num_hidden_layers and not report.skipped
    for path in report.merged:
        same = (model.get_submodule(path).weight == before[f"{path}.weight"]).all(1)  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        assert same[:-1].all() and not same[-1]


def test_an_update_of_zero_is_left_out_and_said(numbers: int) -> None:
    model = build("llama")
    byway.attach(model, byway.LoRA(rank=2))
    before: dict[str, Tensor] = copy.deepcopy(byway.base_state_dict(model))
    report = byway.merge(model)
    assert not report.merged and set(report.skipped.values()) == {"its update is exactly zero"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
