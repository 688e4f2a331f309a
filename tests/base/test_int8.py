"""A frozen base multiplied in 8 bits follows the formula, has the plain backward pass and an error within its bound."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import byway
from byway.base.arithmetic import int8
from byway.base.arithmetic.float32 import computed, widen
from byway.base.arithmetic.int8 import exact_products, in_int8, measure, multiply_in_int8, multiply_plainly, uncovered
from byway.base.arithmetic.integers import hadamard, multiplied, quantized, rotated
from byway.core.adapter import Adapter
from byway.errors import ConfigError
from tests import tiny
from tests.methods import cases

MAPS = {"llama": "model.layers.1.mlp.down_proj", "qwen2": "model.layers.1.self_attn.q_proj", "gpt2": "transformer.h.1.mlp.c_fc"}
"""One map each: without a bias, with a bias, and GPT-2's Conv1D."""


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(base multiplied in 8 bits, the same base multiplied plainly)."""
    model: Any = tiny.build(family)
    model = model.to(dtype).requires_grad_(False)
    twin = copy.deepcopy(model)
    assert multiply_in_int8(model) == ()
    return model, twin


def one_map(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same for one of its maps."""
    model, twin = pair(family, dtype)
    return model.get_submodule(MAPS[family]), twin.get_submodule(MAPS[family])


def matrix(layer: Any) -> Tensor:
    """The weight (o, i)."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def attached(model: Any, method: byway.Method) -> Adapter:
    torch.manual_seed(3)
    adapter = byway.attach(model, method)
    tiny.randomize(adapter.named_parameters())
    return adapter


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The formula in numpy: integers by float32 division and rounding halves to even, everything after that in float64.

    Rows are rotated by the function under test elsewhere, because its float32 rounding decides how halves round.
    """
    block = hadamard(weight.shape[1], weight.device)
    x, weight = rotated(x, block), rotated(weight.float(), block)

    def rounded(rows: Any) -> tuple[Any, Any]:
        scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
        return np.rint(rows / scale).astype(np.int64), scale.astype(np.float64)

    (a, s), (b, t) = rounded(x.float().numpy()), rounded(weight.float().numpy())
    assert np.abs(a).max() == np.abs(b).max() == 127
    return s * t.T * (a @ b.T) + (0 if bias is None else bias.double().numpy())


def loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"), logits[..., 0].numel()


# ---------------------------------------------------------------- one map


@pytest.mark.parametrize("family", sorted(MAPS))
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 1, 20)])
def test_the_answer_is_the_formula_in_float64_to_float32_rounding(family: str, shape: tuple[int, ...]) -> None:
    layer, _ = one_map(family)
    weight = matrix(layer)
    # rows of very different magnitudes
    x = torch.randn(*shape, weight.shape[1]) * torch.logspace(-3, 3, shape[-1])[:, None]
    expected = by_hand(x.reshape(-1, x.shape[-1]), weight, layer.bias)
    own = layer(x)
    assert own.shape == (*shape, weight.shape[0]) and own.dtype == x.dtype
    off = np.abs(own.reshape(-1, own.shape[-1]).double().numpy() - expected)
    assert (off <= 3e-7 * np.abs(expected) + 1e-7 * np.abs(expected).max(1, keepdims=True)).all()


@pytest.mark.parametrize("family", sorted(MAPS))
def test_a_16_bit_base_answers_in_its_own_dtype(family: str) -> None:
    layer, _ = one_map(family, torch.bfloat16)
    x = torch.randn(9, matrix(layer).shape[1]).bfloat16()
    expected = torch.from_numpy(by_hand(x, matrix(layer), layer.bias))
    own = layer(x)
    assert own.dtype == torch.bfloat16
    assert ((own.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("family", sorted(MAPS))
def test_the_input_gets_the_gradient_of_the_plain_map(family: str) -> None:
    layer, twin = one_map(family)
    x = torch.randn(2, 5, matrix(layer).shape[1], requires_grad=True)
    out, plain = layer(x), twin(x)
    assert not torch.equal(out, plain)
    gradient = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, gradient)[0], torch.autograd.grad(plain, x, gradient)[0])


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("family", sorted(MAPS))
def test_the_error_is_within_its_bound(family: str, outlier: float) -> None:
    layer, twin = one_map(family)
    weight = matrix(layer).double()
    x = torch.randn(64, weight.shape[1])
    x[:, 3] *= outlier
    block = hadamard(weight.shape[1], x.device)
    turned, rows = rotated(x, block).double(), rotated(matrix(layer), block)
    s = turned.abs().amax(1, keepdim=True) / 127
    t = rows.double().abs().amax(1) / 127
    codes, scale = quantized(rows)
    bound = turned.abs().sum(1, keepdim=True) * t / 2 + s * (codes.double() * scale).abs().sum(1) / 2
    exact = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    off = (layer(x).double() - exact).abs()
    assert (off <= bound * (1 + 1e-6) + 1e-6 * exact.abs()).all()
    assert off.max() > 0.01 * bound.max()  # the bound is not too loose
    assert off.max() > 10 * (twin(x).double() - exact).abs().max()  # the plain product is far more exact


def test_the_scale_is_each_tokens_own() -> None:
    layer, _ = one_map("llama")
    x = torch.randint(-9, 10, (6, 64)).float()  # sums of integers / 8: the rotation is exact however many rows a CPU takes at once
    before = layer(x)  # of the same shape: products of one row and of six may be summed in another order
    x[0] *= 1e4
    assert torch.equal(layer(x)[1:], before[1:])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_row_of_zeros_gives_the_bias(family: str) -> None:
    layer, _ = one_map(family)
    out = layer(torch.zeros(3, matrix(layer).shape[1]))
    assert torch.equal(out, torch.zeros_like(out) if layer.bias is None else layer.bias.expand_as(out))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_spoils_its_own_row_and_is_seen(bad: float) -> None:
    layer, _ = one_map("llama")
    x = torch.randn(3, 64)
    x[1, 7] = bad
    out = layer(x)
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


def test_no_rows_give_none() -> None:
    layer, _ = one_map("gpt2")
    x = torch.randn(2, 0, 32, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 0, 128)
    out.sum().backward()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (16, 8), (17, 1040), (3, 1048), (5, 4096)])
def test_whole_numbers_are_multiplied_exactly(rows: int, width: int, native: bool) -> None:
    """Also if float32 replaces 8-bit instructions, with nearly all numbers as large as possible."""
    large, odd = torch.full((rows, width), 127, dtype=torch.int8), torch.full((16, width), -127, dtype=torch.int8)
    large[:, 0] = 1  # else all sums are multiples of 127², which float32 holds exactly beyond 2²⁴
    for x, weight in (
        (torch.randint(-127, 128, (rows, width), dtype=torch.int8), torch.randint(-127, 128, (16, width), dtype=torch.int8)),
        (large, odd),
    ):
        found = multiplied(x, weight, native=native)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("width", [8, 24, 64, 192, 576])
def test_turned_rows_have_the_same_products_and_no_channel_is_far_larger(width: int) -> None:
    block = hadamard(width, torch.device("cpu"))
    assert len(block) == min(width & -width, 64)
    assert torch.allclose(block @ block.T, torch.eye(len(block)), atol=1e-6)
    x, weight = torch.randn(6, width).double(), torch.randn(5, width).double()
    assert torch.allclose(rotated(x, block) @ rotated(weight, block).T, x @ weight.T, rtol=0, atol=1e-6 * width)
    large = torch.ones(1, width)
    large[0, 3] = 100.0
    assert rotated(large, block).abs().max() < 100 / len(block) ** 0.5 + len(block) ** 0.5


def test_the_largest_numbers_of_16_bits_are_held() -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    assert rotated(x, hadamard(64, x.device)).isfinite().all()
    assert rotated(torch.ones(1, 64, dtype=torch.bfloat16), hadamard(64, x.device)).dtype == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_it_compiles_in_one_piece(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "multiplies_int8", lambda kind: native)
    model, _ = pair("gpt2")
    x = tiny.inputs("gpt2")
    with torch.no_grad():
        compiled: Any = torch.compile(model.eval(), backend="eager", fullgraph=True)
        assert torch.equal(compiled(**x).logits, model(**x).logits)


def test_autocast_does_not_reach_the_whole_numbers() -> None:
    layer, _ = one_map("llama")
    x = torch.randn(7, 64)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
        layer.weight.data = layer.weight.data.clone()  # computed again
        assert torch.equal(layer(x), plain)


def test_many_rows_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = one_map("qwen2")
    x = torch.randn(77, 32)
    whole = layer(x)
    monkeypatch.setattr(int8, "_AT_ONCE", 32 * 20)
    assert torch.equal(layer(x), whole)


def test_nothing_is_kept_for_the_backward_pass_but_the_weight() -> None:
    layer, _ = one_map("qwen2")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 32, requires_grad=True))
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_only_maps_of_the_layers_are_multiplied_so_and_nothing_is_written(family: str) -> None:
    model: Any = tiny.build(family).requires_grad_(False)
    twin = copy.deepcopy(model)
    assert (computed(model), in_int8(model)) == ("same", False)
    multiply_in_int8(model)
    assert (computed(model), in_int8(model)) == ("int8", True)
    covered = {path for path, module in model.named_modules() if "forward" in vars(module)}
    layers = [path for stack in byway.core.families.facts(model).stacks.values() for path in stack]
    linear = {p for p, m in twin.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    assert covered == {path for path in linear if path.startswith(tuple(f"{layer}." for layer in layers))}
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    own, expected = model.state_dict(), twin.state_dict()
    assert list(own) == list(expected) and all(torch.equal(own[k], expected[k]) for k in own)
    x = tiny.inputs(family)
    with torch.no_grad():
        approximate, plain = model(**x).logits, twin(**x).logits
        assert not torch.equal(approximate, plain)
        assert (approximate - plain).norm() < 0.05 * plain.norm()
        with exact_products(model):
            assert torch.equal(model(**x).logits, plain)
        multiply_plainly(model)
        assert torch.equal(model(**x).logits, plain)
    assert not in_int8(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_maps_whose_sizes_do_not_fit_are_multiplied_plainly_and_named() -> None:
    model: Any = tiny.llama(intermediate_size=60).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    expected = tuple(f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("gate_proj", "up_proj", "down_proj"))
    assert multiply_in_int8(model) == expected == uncovered(model)
    x = torch.randn(4, 32)
    own, plain = model.model.layers[0], twin.model.layers[0]
    assert torch.equal(own.mlp(x), plain.mlp(x))
    assert not torch.equal(own.self_attn.q_proj(x), plain.self_attn.q_proj(x))
    said = int8.described(int8.Error(1.0, 0.01, 0.02), model, slow=False)
    assert "9 of 21 maps plain" in said and "model.layers.0.mlp.down_proj" in said and "slow" not in said


def test_what_is_trained_is_multiplied_plainly() -> None:
    layer, twin = one_map("qwen2")
    x = torch.randn(3, 32)
    for part in ("weight", "bias"):
        getattr(layer, part).requires_grad_(True)
        assert torch.equal(layer(x), twin(x))
        with torch.no_grad():
            assert not torch.equal(layer(x), twin(x))
        getattr(layer, part).requires_grad_(False)


def test_a_weight_that_is_written_cast_or_loaded_is_quantized_again() -> None:
    model, twin = pair("llama")
    x, changed = tiny.inputs("llama"), tiny.build("llama", seed=5)
    for each in (model, twin):
        each.load_state_dict(changed.state_dict())
    multiply_in_int8(twin)
    with torch.no_grad():
        assert torch.equal(model(**x).logits, twin(**x).logits)
        model.bfloat16()
        fresh = copy.deepcopy(changed).bfloat16().requires_grad_(False)
        multiply_in_int8(fresh)
        assert torch.equal(model(**x).logits, fresh(**x).logits)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_multiplies_alike_with_weights_of_its_own(twin_of: Any) -> None:
    model, _ = pair("gpt2")
    x = tiny.inputs("gpt2")
    with torch.no_grad():
        before = model(**x).logits
        twin = twin_of(model)
        model.transformer.h[0].mlp.c_fc.weight.zero_()
        assert torch.equal(twin(**x).logits, before)
        assert not torch.equal(model(**x).logits, before)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", sorted(MAPS))
def test_lora_reads_the_input_itself_and_its_gradients_are_exact(family: str) -> None:
    found: list[tuple[Tensor, ...]] = []
    outs: list[Tensor] = []
    for model in pair(family):
        adapter = attached(model, byway.LoRA(rank=4, targets=[MAPS[family].rpartition(".")[2]]))
        layer = model.get_submodule(MAPS[family])
        torch.manual_seed(11)
        x = torch.randn(2, 7, matrix(layer).shape[1], requires_grad=True)
        out = layer(x)
        gradient = torch.randn_like(out)
        own = [p for name, p in adapter.named_parameters() if name.startswith(MAPS[family])]
        assert len(own) == 2
        found.append(torch.autograd.grad(out, [x, *own], gradient))
        with byway.disabled(model):
            outs.append(out - layer(x))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*found, strict=True))
    torch.testing.assert_close(*outs)  # the LoRA branch is that of the plain base


@pytest.mark.parametrize("name", sorted({name for name, family in cases.PAIRS if family == "llama"}))
def test_every_method_trains_on_it_about_as_on_the_plain_base(name: str) -> None:
    found: list[list[Tensor]] = []
    x = tiny.inputs("llama")
    for model in pair("llama"):
        adapter = attached(model, cases.method_of(name))
        out = model(**x).logits
        gradients = torch.autograd.grad(out.square().sum(), [p for _, p in adapter.named_parameters()], allow_unused=True)
        found.append([torch.zeros(()) if g is None else g for g in gradients])
    own, plain = found
    size = sum(float(g.square().sum()) for g in plain) ** 0.5
    assert size > 0
    assert sum(float((a - b).square().sum()) for a, b in zip(own, plain, strict=True)) ** 0.5 < 0.1 * size


@pytest.mark.parametrize("name", ["lora", "full", "prefix_tuning", "dora"])
def test_disabled_and_detached_it_is_the_8_bit_base_and_then_the_plain_one(name: str) -> None:
    model, twin = pair("llama")
    x = tiny.inputs("llama")
    with torch.no_grad():
        before = model(**x).logits
        attached(model, cases.method_of(name))
        assert not torch.equal(model(**x).logits, before)
        with byway.disabled(model):
            assert torch.equal(model(**x).logits, before)
        byway.detach(model)
        assert torch.equal(model(**x).logits, before)
        multiply_plainly(model)
        assert torch.equal(model(**x).logits, twin(**x).logits)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_a_trained_copy_of_a_map_is_multiplied_plainly() -> None:
    model, twin = pair("llama")
    for each in (model, twin):
        attached(each, byway.Full(targets=["down_proj"], modules_to_save="none"))
    x = torch.randn(3, 64)
    assert torch.equal(model.model.layers[0].mlp.down_proj(x), twin.model.layers[0].mlp.down_proj(x))


def test_merged_weights_are_those_of_the_plain_base_and_are_quantized_anew() -> None:
    model, twin = pair("llama")
    for each in (model, twin):
        attached(each, byway.LoRA(rank=4, targets="all-linear"))
        byway.merge(each)
    own, expected = model.state_dict(), twin.state_dict()
    assert list(own) == list(expected) and all(torch.equal(own[k], expected[k]) for k in own)
    x = tiny.inputs("llama")
    multiply_in_int8(twin)
    with torch.no_grad():
        assert torch.equal(model(**x).logits, twin(**x).logits)


# ---------------------------------------------------------------- how far off, and what is refused


def test_the_error_is_measured_beside_the_plain_products() -> None:
    model, twin = pair("llama")
    batch = tiny.inputs("llama", rows=3, length=16)
    values: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for each in (model, twin):
        adapter = attached(each, byway.LoRA(rank=4, dropout=0.5))
        value, count = loss(each.eval(), batch, labels_only=False)
        values.append((value / count).detach())
        gradients.append(list(torch.autograd.grad(value / count, [p for _, p in adapter.named_parameters()])))
    model.train()
    found = measure(model, batch, loss)
    assert model.training
    assert found.plain == pytest.approx(float(values[1]), rel=1e-6)
    assert found.loss == pytest.approx(float((values[0] - values[1]) / values[1]), rel=1e-2, abs=1e-6)
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(*gradients, strict=True)) ** 0.5
    size = sum(float(b.double().square().sum()) for b in gradients[1]) ** 0.5
    assert found.gradients == pytest.approx(apart / size, rel=1e-3)
    assert 0 < found.gradients < 0.05 and 0 < abs(found.loss) < 0.01


def test_a_base_whose_activations_8_bits_do_not_hold_is_refused(data_dir: Path) -> None:
    model, tokenizer = byway.load_base(data_dir / "stories260k" / "hf")
    assert tokenizer is not None
    model.requires_grad_(False)
    batch = tokenizer("Once upon a time there was a little girl who liked to play with her dog in the park.", return_tensors="pt")
    badly: Any = copy.deepcopy(model)
    with torch.no_grad():
        for layer in badly.model.layers:
            # the same function, but one channel of the maps' input is far larger than the others
            for norm, readers in (
                ("input", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
                ("post_attention", "mlp.gate_proj mlp.up_proj"),
            ):
                layer.get_submodule(f"{norm}_layernorm").weight[5] *= 2**14
                for name in readers.split():
                    layer.get_submodule(name).weight[:, 5] /= 2**14
    for each in (model, badly):
        multiply_in_int8(each)
        byway.attach(each, byway.LoRA(rank=2))
    well = measure(model, batch, loss)
    assert abs(well.loss) < 0.03
    with pytest.raises(ConfigError, match=rf"its loss is .* where the plain products give {well.plain:.4g}"):
        measure(badly, batch, loss)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: tiny.build("llama").double(), "float64"),
        (
            lambda: tiny.llama(hidden_size=36, intermediate_size=60, num_attention_heads=6, num_key_value_heads=3),
            "none has sizes that are multiples of 8",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "compute 'int8'"),
    ],
)
def test_what_cannot_be_multiplied_so_is_refused(change: Any, says: str) -> None:
    model = change()
    with pytest.raises(ConfigError, match=says):
        multiply_in_int8(model)
    assert not in_int8(model)


def test_maps_with_another_forward_are_refused() -> None:
    model = tiny.build("llama").bfloat16()
    widen(model)
    with pytest.raises(ConfigError, match="computed in float32 already"):
        multiply_in_int8(model)
    assert computed(model) == "fp32"


def test_a_quantized_base_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    model: Any = tiny.build("llama")
    model.model.layers[0].mlp.down_proj = bnb.nn.Linear4bit(64, 32, bias=False)
    with pytest.raises(ConfigError, match="this one is quantized"):
        multiply_in_int8(model)


def test_a_device_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(int8, "multiplied", none)
    model = tiny.build("llama")
    with pytest.raises(ConfigError, match=r"cpu has no product of 8-bit matrices here \(not implemented for 'Char'\)"):
        multiply_in_int8(model)
    assert not in_int8(model)
