"""``compute``: in which numbers a base is multiplied, apart from how it is kept."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from byway.base import load_base
from byway.base.arithmetic import float32 as compute
from byway.core.weights import widened
from byway.errors import ConfigError

IDS = torch.arange(3, 19)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_fp32_keeps_the_dtype_asked_for_and_answers_in_float32(llama_directory: Path) -> None:
    plain, _ = load_base(llama_directory, "bf16")
    model, _ = load_base(llama_directory, "bf16", compute="fp32")
    assert model.dtype == torch.bfloat16
    assert logits(plain).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(copy.deepcopy(plain).float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("instructions", "widens"), [(True, False), (False, True)])
def test_auto_goes_by_what_the_processor_multiplies(
    llama_directory: Path, instructions: bool, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "multiplies_bf16", lambda: instructions)
    assert widened(load_base(llama_directory, "bf16", compute="auto", device_map="cpu")[0]) is widens
    assert not widened(load_base(llama_directory, "fp32", compute="auto", device_map="cpu")[0])


def test_without_asking_a_base_is_transformers_own(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "multiplies_bf16", lambda: False)
    for model, _ in (load_base(llama_directory, "bf16"), load_base(llama_directory, "bf16", compute="same")):
        assert not widened(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "asked", "says"),
    [
        ("bf16", "fp23", "did you mean 'fp32'"),
        ("bf16", "exact", "one of: auto, fp32, int8, same"),
        (torch.float64, "fp32", "would lose precision"),
    ],
)
def test_what_cannot_be_computed_is_refused(llama_directory: Path, dtype: Any, asked: str, says: str) -> None:
    with pytest.raises(ConfigError, match="compute") as caught:
        load_base(llama_directory, dtype, compute=asked)
    assert says in str(caught.value)


def test_experts_grow_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import zoo

    zoo.build("mixtral").bfloat16().save_pretrained(tmp_path)
    load_base(tmp_path, compute="fp32")
    assert "are kept in float32" in capsys.readouterr().err


def test_a_4_bit_base_dequantizes_to_float32(llama_directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what bitsandbytes and accelerate warn about on import is not ours
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
        plain, _ = load_base(llama_directory, "bf16", "nf4")
        model, _ = load_base(llama_directory, "bf16", "nf4", compute="fp32")
        exact, _ = load_base(llama_directory, "fp32", "nf4")
        assert logits(model).dtype == torch.float32
        # both round the weights to bfloat16; one also rounds every product
        own, theirs = ((logits(each).float() - logits(exact)).abs().max() for each in (model, plain))
    assert own < theirs
