"""What training tests have, and nothing without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.train.conftest import bert_dir, llama_dir, make_recipe, picture, quick_picture

__all__ = ["bert_dir", "llama_dir", "make_recipe", "picture", "quick_picture"]


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch sees none here")
