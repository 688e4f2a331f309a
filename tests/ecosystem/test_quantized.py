"""LoRA on a base that bitsandbytes keeps in 4 or 8 bits: the same gradients, evaluations that leave no trace, merges that lose nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.weights import dense, is_quantized, plain
from byway.engine.loss.tokens import token_loss
from tests import tiny

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")

QUANTIZERS = ("nf4", "int8")
ALL = byway.LoRA(rank=4, alpha=8, targets="all-linear")


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums in one order, no GPU, and a CPU on which bitsandbytes would re-pack 4-bit weights at an evaluation."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what bitsandbytes and accelerate say of themselves
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose maps are wide enough for blocks of 64."""
    path = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    tiny.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.1).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "biases"
    torch.manual_seed(0)
    model = tiny.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def load(directory: Path, quantize: str | None = "nf4", dtype: str = "fp32") -> Any:
    return byway.load_base(directory, dtype=dtype, quantize=quantize)[0]


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (2, 11), generator=g)
        found.append({"input_ids": ids, "labels": ids.clone()})
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(batches(1)[0]["input_ids"], use_cache=False).logits.float()


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if is_quantized(module)}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def action(module: Any) -> Tensor:
    """What the module does to the unit vectors, as a matrix (out, in)."""
    with torch.no_grad():
        return module(torch.eye(module.in_features)).T


def dequantized_twin(model: Any, directory: Path) -> Any:
    """The unquantized model with the quantized one's weights: ordinary torch throughout."""
    twin = load(directory, None)
    for path, module in quantized(model).items():
        with torch.no_grad():
            twin.get_submodule(path).weight.copy_(dense(module))
    return twin


# ---------------------------------------------------------------- the weight


@pytest.mark.parametrize("training", [True, False])
def test_the_dense_weight_of_nf4_is_what_the_module_does(directory: Path, training: bool) -> None:
    for module in quantized(load(directory).train(training)).values():
        before = dense(module)
        assert relative(before, action(module)) <= 1e-6
        assert torch.equal(dense(module), before)


def test_the_dense_weight_of_int8_is_what_the_module_does_and_what_bitsandbytes_dequantizes(directory: Path) -> None:
    from bitsandbytes import functional

    model: Any = load(directory, "int8")
    for module in quantized(model).values():
        before = dense(module)
        # bitsandbytes multiplies 8-bit maps in float16: 2^-11
        assert relative(before, action(module)) <= 5e-4
        assert torch.equal(dense(module), before), "the codes move from the weight to the state at the first forward"
        state: Any = module.state
        assert relative(before, functional.int8_vectorwise_dequant(state.CB, state.SCB)) <= 1e-6


def test_nf4_codes_mean_the_table_of_the_qlora_paper(directory: Path) -> None:
    """arXiv 2305.14314, appendix E: each value is one of sixteen numbers times the largest of its block of 64."""
    table = torch.tensor(
        (
            *(-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
        )
    )
    weight = dense(load(directory).model.layers[0].mlp.up_proj)
    blocks = weight.reshape(-1, 64)
    shares = blocks / blocks.abs().amax(1, keepdim=True)
    assert float((shares[..., None] - table).abs().amin(-1).max()) <= 1e-6


def test_a_weight_that_bitsandbytes_has_repacked_is_still_read_right(directory: Path) -> None:
    """A model that load_base has not loaded: its first evaluation on a CPU with AVX512-BF16 rewrites the bytes."""
    from bitsandbytes import functional

    module: Any = load(directory).model.layers[0].mlp.up_proj
    before = dense(module)
    module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
    packed, scales = module.weight.data.clone(), module.weight.quant_state.absmax.clone()
    with_bf16_scales = 2.0**-8
    assert relative(dense(module), before) <= with_bf16_scales
    assert relative(functional.dequantize_4bit(module.weight.data, module.weight.quant_state), before) > 0.5, "the direct way is garbage"
    assert torch.equal(module.weight.data, packed) and torch.equal(module.weight.quant_state.absmax, scales), "reading must not write"


# ---------------------------------------------------------------- training


def loss_and_gradients(model: Any, checkpointing: bool = False) -> tuple[float, dict[str, Tensor]]:
    adapter = byway.attach(model, ALL)
    tiny.randomize(adapter.named_parameters())
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, count = token_loss(model.train(), batches(1)[0], labels_only=True)
    (loss / count).backward()
    return float(loss), {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_lora_on_the_dequantized_base(directory: Path, checkpointing: bool) -> None:
    model = load(directory)
    expected_loss, expected = loss_and_gradients(dequantized_twin(model, directory))
    loss, got = loss_and_gradients(model, checkpointing)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert got.keys() == expected.keys() and len(got) == 2 * 7 * 2
    assert max(relative(got[name], expected[name]) for name in expected) <= 1e-5


def train(model: Any, adapter: byway.Adapter) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=1e-2)
    for batch in batches():
        loss, count = token_loss(model, batch, labels_only=True)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_evaluating_and_generating_before_training_and_merging_changes_no_bit(directory: Path, quantize: str) -> None:
    found = []
    for look in (False, True):
        model = load(directory, quantize)
        adapter = byway.attach(model, ALL)
        tiny.randomize(adapter.named_parameters())
        if look:
            logits(model)
            with torch.no_grad():
                model.generate(batches(1)[0]["input_ids"], max_new_tokens=4, do_sample=False)
        train(model, adapter)
        trained = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        byway.merge(model)
        found.append((trained, dict(model.state_dict())))
    (adapter_a, merged_a), (adapter_b, merged_b) = found
    assert all(torch.equal(adapter_a[name], adapter_b[name]) for name in adapter_a)
    assert merged_a.keys() == merged_b.keys()
    assert all(torch.equal(merged_a[name], merged_b[name]) for name in merged_a)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_training_leaves_the_quantized_base_bit_for_bit(directory: Path, quantize: str) -> None:
    model = load(directory, quantize)
    bare = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = byway.attach(model, ALL)
    train(model, adapter)
    byway.detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), bare)


# ---------------------------------------------------------------- merging


def merged(
    directory: Path, quantize: str, dtype: str, method: byway.Method = ALL, scale: float = 0.1
) -> tuple[Any, dict[str, Tensor], Any]:
    """(merged model, expected weights by path in float64, logits before the merge)."""
    model = load(directory, quantize, dtype)
    adapter = byway.attach(model, method)
    tiny.randomize(adapter.named_parameters())
    expected = {}
    for site, side in adapter.side_paths():
        if "lora_A" in dict(side.named_parameters()):
            factors = {name: p.detach().double() for name, p in side.named_parameters()}
            expected[site.path] = dense(site.module).double() + 8 / 4 * factors["lora_B"] @ factors["lora_A"]
    before = logits(model)
    byway.merge(model)
    return model, expected, before


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 2.0**-24), ("bf16", 2.0**-8)])
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_merging_gives_ordinary_maps_that_hold_the_dequantized_weight_plus_the_update(
    directory: Path, quantize: str, dtype: str, rounding: float
) -> None:
    model, expected, _ = merged(directory, quantize, dtype)
    assert not quantized(model) and len(expected) == 7 * 2
    for path, weight in expected.items():
        module = model.get_submodule(path)
        assert type(module) is nn.Linear
        assert module.weight.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        # rounded once: half a unit in the last place, of float32 sums where the result is float32
        assert ((module.weight.double() - weight).abs() <= weight.abs() * rounding + 1e-7).all()


def test_the_merged_model_answers_as_the_attached_one_did(directory: Path) -> None:
    model, _, before = merged(directory, "nf4", "fp32")
    assert relative(logits(model), before) <= 1e-5


def test_a_16_bit_merge_of_a_4_bit_map_keeps_a_small_update(directory: Path, seed: int) -> None:
    """|ΔW| / |W| = 0.02 in bfloat16: the output moves by at most 5e-3, and at most a tenth of the update's effect is lost."""
    model = nn.Sequential(load(directory, "nf4", "bf16").model.layers[0].mlp.up_proj)
    weight = dense(model[0]).float()
    adapter = byway.attach(model, byway.LoRA(rank=8, alpha=8, targets=["0"]))
    tiny.randomize(adapter.named_parameters(), seed=seed)
    factors = dict(adapter.named_parameters())
    a, b = factors["0.byway.default.lora_A"].detach(), factors["0.byway.default.lora_B"].detach()
    b.mul_(0.02 * weight.norm() / (b @ a).norm())
    x = torch.randn(64, weight.shape[1])
    base, effect = x @ weight.T, x @ (b @ a).T
    byway.merge(model)
    assert type(model[0]) is nn.Linear and model[0].weight.dtype is torch.bfloat16
    out = x @ model[0].weight.float().T
    assert relative(out, base + effect) <= 5e-3
    assert float((out - base - effect).norm() / effect.norm()) <= 0.10


def test_a_trained_bias_and_an_update_of_one_quantized_map_are_both_merged(with_biases: Path) -> None:
    model = load(with_biases)
    adapter = byway.attach(model, byway.LoRA(rank=4, alpha=8, targets=["q_proj"], bias="lora_only"))
    tiny.randomize(adapter.named_parameters())
    before = logits(model)
    byway.merge(model)
    assert relative(logits(model), before) <= 1e-5


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_merged_model_is_saved_and_loaded_as_it_is(directory: Path, quantize: str, tmp_path: Path) -> None:
    """A quantization_config left in config.json would quantize the merged weights again, without a word, on loading."""
    model, _, _ = merged(directory, quantize, "fp32")
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", None)
    assert not quantized(again)
    assert torch.equal(logits(again), logits(model))


def test_a_partly_merged_model_keeps_its_other_maps_quantized_when_loaded_again(directory: Path, tmp_path: Path) -> None:
    model, expected, before = merged(directory, "nf4", "fp32", byway.LoRA(rank=4, alpha=8, targets=["q_proj", "up_proj"]))
    assert set(expected) == {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert len(quantized(model)) == 2 * 7 - len(expected)
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", None)
    assert quantized(again).keys() == quantized(model).keys()
    assert all(torch.equal(again.get_submodule(path).weight, model.get_submodule(path).weight) for path in expected)
    assert relative(logits(again), before) <= 1e-5


def test_a_plain_copy_takes_the_dtype_it_is_asked_for(directory: Path) -> None:
    module: Any = load(directory, "int8", "bf16").model.layers[0].mlp.up_proj
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        twin: Any = plain(module, dtype)
        assert type(twin) is nn.Linear and torch.equal(twin.weight, dense(module).to(dtype))
