"""An adapter of the built-in base, which is on no hub: its files say how other programs get the base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import byway
import byway.base.load
from byway.base import BUILT_IN
from byway.compat import peft as facade

IDS = torch.tensor([[5, 9, 3, 60, 7, 3]])


@pytest.fixture
def adapter(chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.Tensor]:
    """The directory of an adapter on a small stand-in for the built-in base, and what the adapted model answers."""
    monkeypatch.setattr(byway.base.load, "built_in_directory", lambda cache_dir: chat_base)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = byway.load_base(BUILT_IN)
    made = byway.attach(model, byway.LoRA(rank=2))
    for _, parameter in made.named_parameters():
        nn.init.normal_(parameter)
    return made.save(tmp_path / "a", tokenizer), model(IDS).logits.detach()


def test_the_readme_tells_how_to_export_the_base_and_hf_peft_then_agrees(adapter: tuple[Path, torch.Tensor]) -> None:
    directory, expected = adapter
    readme = (directory / "README.md").read_text()
    assert BUILT_IN in readme and "on no hub" in readme
    names: dict[str, object] = {}
    exec("import byway, peft, transformers", names)
    for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[1:]:
        exec(block.replace("'PATH'", repr(str(directory))), names)
    found = names["model"]
    assert isinstance(found, nn.Module) and (found(IDS).logits - expected).abs().max() < 1e-5


def test_the_facade_finds_the_built_in_base(adapter: tuple[Path, torch.Tensor]) -> None:
    directory, expected = adapter
    found = facade.AutoPeftModelForCausalLM.from_pretrained(directory)
    assert (found(IDS).logits - expected).abs().max() < 1e-5
    found.save_pretrained("again")
    assert facade.PeftConfig.from_pretrained("again").base_model_name_or_path == BUILT_IN


def test_other_bases_need_no_such_text(chat_base: Path, tmp_path: Path) -> None:
    model, _ = byway.load_base(chat_base)
    assert "on no hub" not in (byway.attach(model, byway.LoRA(rank=2)).save(tmp_path / "a") / "README.md").read_text()
