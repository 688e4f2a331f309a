"""The tiny bases of the training tests serve here too."""

from __future__ import annotations

from tests.train.conftest import bert_dir, llama_dir, make_recipe, one_thread, picture, quick_picture

__all__ = ["bert_dir", "llama_dir", "make_recipe", "one_thread", "picture", "quick_picture"]
