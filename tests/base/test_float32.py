"""A base kept in 16 bits and multiplied in float32 equals ``model.float()`` in half the memory, with any adapter
attached."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import byway
from byway.base.arithmetic import float32 as compute
from byway.base.arithmetic.float32 import widen
from byway.core.adapter import Adapter
from byway.core.weights import widened
from tests import tiny, zoo
from tests.methods import cases


def pair(family: str, kept: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(widened base, the same base with all tensors in float32)."""
    narrow: Any = tiny.build(family)
    narrow = narrow.to(kept)
    twin = copy.deepcopy(narrow).float()
    widen(narrow)
    return narrow, twin


def attached(model: Any, method: byway.Method) -> Adapter:
    torch.manual_seed(3)
    adapter = byway.attach(model, method)
    tiny.randomize(adapter.named_parameters())
    return adapter


def gradients(model: Any, adapter: Adapter, x: dict[str, Any]) -> list[Tensor]:
    out = model(**x).logits.float()
    found = torch.autograd.grad(out.square().sum(), [p for _, p in adapter.named_parameters()], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def apart(own: list[Tensor], expected: list[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(own, expected, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_every_family_answers_as_the_float32_base_does(name: str) -> None:
    narrow = zoo.build(name).eval().bfloat16().requires_grad_(False)
    twin = copy.deepcopy(narrow).float()
    widen(narrow)
    x = zoo.inputs(twin)
    with torch.no_grad():
        own, expected = narrow(**x), twin(**x)
    key = next(k for k, v in expected.items() if isinstance(v, Tensor))
    assert own[key].dtype == torch.float32
    torch.testing.assert_close(own[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [(m, f) for m, f in cases.PAIRS if f in ("llama", "gpt2", "bert", "t5")], ids="-".join)
def test_every_method_trains_on_it_as_on_the_float32_base(case: tuple[str, str]) -> None:
    name, family = case
    narrow, twin = pair(family)
    x = tiny.inputs(family)
    own = gradients(narrow, attached(narrow, cases.method_of(name)), x)
    expected = gradients(twin, attached(twin, cases.method_of(name)), x)
    assert apart(own, expected) < 1e-5


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_it_is_nearer_to_float32_than_the_plain_16_bit_computation(kept: torch.dtype) -> None:
    narrow, twin = pair("llama", kept)
    plain: Any = tiny.build("llama")
    plain = plain.to(kept)
    x, method = tiny.inputs("llama"), byway.LoRA(rank=4, targets="all-linear")
    expected = gradients(twin, attached(twin, method), x)
    own = apart(gradients(narrow, attached(narrow, method), x), expected)
    theirs = apart(gradients(plain, attached(plain, method), x), expected)
    assert own < 1e-5 < theirs


def test_weights_keep_their_bytes_types_and_keys_and_only_small_tensors_grow() -> None:
    narrow = tiny.build("llama").bfloat16()
    before, types = {k: v.clone() for k, v in narrow.state_dict().items()}, [type(m) for m in narrow.modules()]
    share = widen(narrow)
    after = narrow.state_dict()
    assert [type(m) for m in narrow.modules()] == types
    assert {k: v.dtype for k, v in after.items()} == {k: torch.float32 if "norm" in k else torch.bfloat16 for k in before}
    assert all(torch.equal(after[k].to(v.dtype), v) for k, v in before.items())
    assert share == sum(v.numel() for k, v in before.items() if "norm" in k) / sum(p.numel() for p in narrow.parameters())
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    assert widened(narrow)
    assert not widened(narrow.model.norm)


def test_a_float32_base_is_left_alone() -> None:
    model = tiny.build("llama")
    assert widen(model) == 0
    assert not widened(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_weight_read_past_its_module_becomes_float32() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).bfloat16()
    x, twin = torch.randn(1, 3, 8), copy.deepcopy(attention).float()
    widen(attention)
    assert attention.out_proj.weight.dtype == torch.float32
    torch.testing.assert_close(attention(x, x, x)[0], twin(x, x, x)[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [1, 70, 10_000])
def test_a_product_by_tiles_is_the_product(transposed: bool, bias: bool, tile: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_TILE", tile)
    layer: nn.Module = Conv1D(13, 24) if transposed else nn.Linear(24, 13, bias=bias)
    layer.bfloat16().requires_grad_(False)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(13))
    weight, kept = layer.weight.double(), layer.bias
    wide = nn.Sequential(layer)
    widen(wide)
    x = torch.randn(2, 5, 24, requires_grad=True)
    out = wide(x)
    expected = F.linear(x.double(), weight.T if transposed else weight, None if kept is None else kept.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grown = torch.randn(2, 5, 13)
    (own,) = torch.autograd.grad(out, x, grown)
    torch.testing.assert_close(own.double(), grown.double() @ (weight.T if transposed else weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 0, 24), (1, 2, 3, 24)])
def test_any_number_of_leading_dimensions_goes(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(24, 13).bfloat16().requires_grad_(False)
    twin = copy.deepcopy(layer).float()
    widen(layer)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, twin(x))
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


def test_nothing_is_kept_for_the_backward_pass_but_what_is_there_already() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16().requires_grad_(False)
    widen(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(4, 16, requires_grad=True))
    own = {p.data_ptr() for p in model.parameters()}
    assert len(kept) == 2
    assert all(t.data_ptr() in own for t in kept)


def test_a_weight_that_requires_a_gradient_gets_one() -> None:
    model, twin = pair("llama")
    x = tiny.inputs("llama")
    for each in (model, twin):
        each(**x).logits.square().mean().backward()
    found = {k: p.grad for k, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name].float(), parameter.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_alike_with_weights_of_its_own(twin_of: Any) -> None:
    model, _ = pair("gpt2")
    x = tiny.inputs("gpt2")
    with torch.no_grad():
        before = model(**x).logits
        twin = twin_of(model)
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        assert torch.equal(twin(**x).logits, before)
        assert not torch.equal(model(**x).logits, before)


@pytest.mark.parametrize("name", ["lora", "full", "prefix_tuning"])
def test_detach_leaves_it_as_it_was(name: str) -> None:
    model, _ = pair("llama")
    x = tiny.inputs("llama")
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model.requires_grad_(False)(**x).logits
        attached(model, cases.method_of(name))
        assert not torch.equal(model(**x).logits, before)
        with byway.disabled(model):
            assert torch.equal(model(**x).logits, before)
        byway.detach(model)
        assert torch.equal(model(**x).logits, before)
    assert list(model.state_dict()) == keys
    assert widened(model)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_trained_copy_answers_in_float32_too(module: str) -> None:
    method = byway.LoRA(rank=2, targets=["q_proj"], modules_to_save=[module])
    narrow, twin = pair("llama")
    x = tiny.inputs("llama")
    own, expected = (gradients(m, attached(m, method), x) for m in (narrow, twin))
    assert apart(own, expected) < 1e-5


def test_merged_weights_are_those_of_the_plain_base_and_still_computed_in_float32() -> None:
    narrow, _ = pair("llama")
    plain = tiny.build("llama").bfloat16()
    method = byway.LoRA(rank=4, targets="all-linear")
    for model in (narrow, plain):
        attached(model, method)
        byway.merge(model)
    own, expected = narrow.state_dict(), plain.state_dict()
    assert all(torch.equal(own[k].to(v.dtype), v) for k, v in expected.items())
    x = tiny.inputs("llama")
    with torch.no_grad():
        torch.testing.assert_close(narrow(**x).logits, plain.float()(**x).logits)


def test_generated_tokens_are_those_of_the_float32_base() -> None:
    narrow, twin = pair("llama")
    x = {"input_ids": tiny.inputs("llama")["input_ids"], "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(narrow.generate(**x), twin.generate(**x))


def test_its_files_and_its_adapters_files_go_with_the_plain_base(tmp_path: Path) -> None:
    tiny.build("llama").bfloat16().save_pretrained(tmp_path / "plain")
    narrow, _ = byway.load_base(tmp_path / "plain", compute="fp32")
    narrow.save_pretrained(tmp_path / "base")
    adapter = attached(narrow, byway.LoRA(rank=4))
    adapter.save(tmp_path / "adapter")
    x = tiny.inputs("llama")
    with torch.no_grad():
        expected = narrow(**x).logits
    saved, _ = byway.load_base(tmp_path / "base", dtype="bf16")
    original, _ = byway.load_base(tmp_path / "plain")
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in saved.state_dict().items())
    byway.load(saved, tmp_path / "adapter")  # compares the base's fingerprint
    again, _ = byway.load_base(tmp_path / "base", dtype="bf16", compute="fp32")
    byway.load(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**x).logits, expected)
