"""The models of the workshop tests."""

from __future__ import annotations

from tests.workshop.conftest import chat_base

__all__ = ["chat_base"]
