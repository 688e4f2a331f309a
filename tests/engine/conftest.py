"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from byway.engine.loss import tokens as loss


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of five rows, so that a tiny batch has several, the last one shorter."""
    monkeypatch.setattr(loss, "chunk_rows", lambda vocabulary, device: 5)
