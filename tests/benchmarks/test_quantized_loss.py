"""benchmarks/quantized_loss.py on a tiny model: LoRA beside a quantized base with biases has the losses of peft's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import VOCABULARY, build


@pytest.fixture
def quantized_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/quantized_loss.py as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("quantized_loss")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_tiny_qwen2_learns_step_by_step_what_it_does_under_peft(
    quantize: str, quantized_loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    monkeypatch.setattr(quantized_loss, "RATE", 1e-2)
    build("qwen2").save_pretrained(tmp_path)
    draws = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, VOCABULARY, (2, 9), generator=draws)
    found = quantized_loss.both(tmp_path, quantize, [{"input_ids": drawn, "labels": drawn}] * 12)
    assert found["peft"][-1] < found["peft"][0] - 0.3
    assert found["byway"] == pytest.approx(found["peft"], abs=5e-4)
