"""The models and recipes of the training and the workshop tests."""

from __future__ import annotations

from tests.train.conftest import bert_dir, llama_dir, make_recipe, one_thread, picture, quick_picture
from tests.workshop.conftest import chat_adapter, chat_base, logits

__all__ = ["bert_dir", "chat_adapter", "chat_base", "llama_dir", "logits", "make_recipe", "one_thread", "picture", "quick_picture"]
