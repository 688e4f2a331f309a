"""Files that peft wrote beside a base which it had changed at the start (PiSSA, OLoRA): the start is computed again and subtracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import byway
from byway.errors import AdapterError
from tests.tiny import build, inputs


def write(start: str, use_dora: bool, directory: Path, seed: int) -> torch.Tensor:
    """A trained adapter of peft on a tiny Llama; returns its logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=start, use_dora=use_dora)
    model = get_peft_model(build("llama"), config).eval()  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=g))
        out = model(**inputs("llama")).logits
    model.save_pretrained(str(directory))
    return out


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_a_file_of_peft_gives_pefts_logits_whatever_its_start_was(start: str, use_dora: bool, tmp_path: Path, seed: int) -> None:
    theirs = write(start, use_dora, tmp_path / "a", seed)
    model = build("llama")
    adapter = byway.load(model, tmp_path / "a")
    with torch.no_grad():
        ours, bare = model(**inputs("llama")).logits, build("llama")(**inputs("llama")).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (theirs - bare).abs().max() > 1e-2
    adapter.save(tmp_path / "b")  # an ordinary LoRA now, which needs no start
    again = build("llama")
    byway.load(again, tmp_path / "b")
    with torch.no_grad():
        assert (again(**inputs("llama")).logits - ours).abs().max() < 1e-5


def test_a_start_that_cannot_be_computed_again_is_refused_by_name(tmp_path: Path, seed: int) -> None:
    write("pissa_niter_4", False, tmp_path / "a", seed)
    with pytest.raises(AdapterError, match="init_lora_weights: pissa_niter_4"):
        byway.load(build("llama"), tmp_path / "a")
