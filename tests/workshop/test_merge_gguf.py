"""A base in a GGUF file has no safetensors files to rewrite: it is merged in memory, and certified all the same."""

from __future__ import annotations

from pathlib import Path

import torch

from byway import LoRA, attach, load_base, merge_files
from tests.base.conftest import gguf_file, llama  # noqa: F401 - fixtures
from tests.workshop.conftest import moved_off_zero


def test_an_adapter_on_a_gguf_file_is_merged_in_memory(gguf_file: Path, tmp_path: Path, logits) -> None:  # noqa: F811
    model, _ = load_base(gguf_file)
    moved_off_zero(attach(model, LoRA(rank=2, targets=["q_proj", "v_proj"]))).save(tmp_path / "adapter")
    result = merge_files(gguf_file, tmp_path / "adapter", tmp_path / "out", samples=2)
    assert result.certificate.passed and any("the base has no safetensors files" in note for note in result.notes)
    merged, _ = load_base(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
