"""Bases quantized while loading: which modules, what training after an evaluation sees, and quiet logs."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from byway.base import load_base
from byway.core.weights import dense
from byway.errors import ConfigError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")


@pytest.fixture(autouse=True)
def others_warnings():
    """What bitsandbytes and accelerate warn about on import is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def kinds(model: torch.nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(("quantize", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_every_linear_but_the_head_is_quantized(llama, llama_directory: Path, quantize: str, kind: str) -> None:
    model, _ = load_base(llama_directory, quantize=quantize)
    found = kinds(model)
    assert found.pop("lm_head") == "Linear"
    assert set(found.values()) == {kind}
    assert len(found) == 14
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    original = llama.model.layers[1].mlp.up_proj.weight
    error = (dense(model.model.layers[1].mlp.up_proj) - original).abs().max() / original.abs().max()
    # half the widest gap of the NF4 table, 1 - 0.6962, and of 127 steps; a tenth more for the double quantization of the scales
    assert 0 < error <= (0.5 * (1 - 0.6962) * 1.1 if quantize == "nf4" else 0.5 / 127 * 1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (8, 16), (12, 32), (4, 48), (3, 160), (5, 90), (6, 97)])
def test_4_bit_weights_of_any_width_are_the_table_times_the_scales(
    llama_directory: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """bitsandbytes' own AVX512 kernel gets rows wrong that are a multiple of 16 long but not of the block size."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    load_base(llama_directory, quantize="nf4")
    layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    layer.weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    original = layer.weight.data.double()
    layer = layer.to("cpu")
    codes, state = layer.weight.data.flatten().int(), layer.weight.quant_state
    numbers = torch.stack([codes >> 4, codes & 15], 1).flatten()[: original.numel()]
    expected = (state.code.double()[numbers] * state.absmax.double().repeat_interleave(64)[: original.numel()]).reshape(shape)
    assert (expected - original).abs().max() < 0.5 * (1 - 0.6962) * original.abs().max()
    for found in (dense(layer), dequantize_4bit(layer.weight.data, state)):
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    x = torch.eye(shape[1], dtype=dtype)
    torch.testing.assert_close(layer.train()(x).T.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_new_classifier_and_its_pooler_stay_whole(bert_directory: Path) -> None:
    model, _ = load_base(bert_directory, quantize="nf4", task="classification", num_labels=2)
    found = kinds(model)
    assert found["classifier"] == found["bert.pooler.dense"] == "Linear"
    assert found["bert.encoder.layer.0.attention.self.query"] == "Linear4bit"


def test_gradients_after_an_evaluation_are_those_without_one(data_dir: Path) -> None:
    path = data_dir / "stories260k" / "hf"

    def gradients(evaluate: bool) -> torch.Tensor:
        model, _ = load_base(path, quantize="nf4")
        ids = torch.arange(5, 37)[None]
        if evaluate:
            with torch.no_grad():
                model.eval()(ids)
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.train()(inputs_embeds=inputs, labels=ids).loss.backward()
        assert inputs.grad is not None
        return inputs.grad

    assert torch.equal(gradients(evaluate=True), gradients(evaluate=False))


def test_no_weight_is_repacked_at_an_evaluation_on_cpus_that_could(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model, _ = load_base(llama_directory, quantize="nf4")
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight.detach().clone()
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert linear.weight.dtype is torch.uint8
    assert torch.equal(linear.weight, before)


def test_int8_does_not_log_a_line_per_layer_but_still_logs_others(llama_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_base(llama_directory, dtype="bf16", quantize="int8")
    load_base(llama_directory, dtype="bf16", quantize="int8")
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert "inputs will be cast" not in caplog.text
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("something else")
    assert "something else" in caplog.text
    assert len(logger.filters) == 1


def test_a_base_stored_quantized_cannot_be_quantized_again(llama_directory: Path, tmp_path: Path) -> None:
    model, _ = load_base(llama_directory, quantize="nf4")
    model.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ConfigError, match="stored quantized already"):
        load_base(tmp_path / "nf4", quantize="int8")
    again, _ = load_base(tmp_path / "nf4")
    assert kinds(again)["model.layers.0.mlp.up_proj"] == "Linear4bit"


@pytest.mark.parametrize("claim", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"load_in_4bit": True, "quant_method": "bitsandbytes"}])
def test_a_configuration_that_claims_quantized_weights_over_plain_ones_is_refused(
    llama_directory: Path, tmp_path: Path, claim: dict[str, object]
) -> None:
    base = shutil.copytree(llama_directory, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": claim}))
    with pytest.raises(ConfigError, match=r"config\.json says that \d+ linear maps are stored in [48] bits") as caught:
        load_base(base)
    assert "quantization_config" in caught.value.hint
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert kinds(load_base(base)[0])["model.layers.0.mlp.up_proj"] == "Linear"
    assert kinds(load_base(base, quantize="nf4")[0])["model.layers.0.mlp.up_proj"] == "Linear4bit"


def test_a_missing_package_is_named_with_the_extra(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match="needs bitsandbytes") as caught:
        load_base(llama_directory, quantize="nf4")
    assert "byway[quant]" in caught.value.hint
