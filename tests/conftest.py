"""Fixtures that every test may use: a printed seed, the real data where it is, small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def seed() -> int:
    """The seed from which sizes and inputs are drawn; printed, so that a failure can be repeated with BYWAY_TEST_SEED."""
    import torch

    value = int(os.environ.get("BYWAY_TEST_SEED", "20261122"))
    print(f"BYWAY_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (BYWAY_DATA, default ../shared/data); its absence skips the test and says so."""
    folder = Path(os.environ.get("BYWAY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set BYWAY_DATA")
    return folder
