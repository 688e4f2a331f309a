"""Fixtures for all tests: a printed seed, real data if present. Draws the covering samples of large matrices."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.covering import sampled, seed_of_the_tests

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
DRAWN = pytest.StashKey[dict[str, tuple[list[pytest.Item], list[pytest.Item]]]]()
"""Test function → (its cases, the drawn ones)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every case of every matrix, not a sample that covers each value")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "covering_sample(*axes, times=1): without --full, run only a drawn sample of the cases, in which every value of each axis "
        "(a parameter, or a tuple of parameters; default: each parameter) occurs at least `times` times",
    )


@pytest.hookimpl(trylast=True)  # after -k and -m: the sample covers what was asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[DRAWN] = {} if config.getoption("--full") else sampled(items, seed_of_the_tests())
    left_out = {case for cases, drawn in config.stash[DRAWN].values() for case in cases if case not in drawn}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    kind = "every case of every matrix" if config.getoption("--full") else "covering samples (--full runs every case)"
    terminalreporter.write_line(f"BYWAY_TEST_SEED={seed_of_the_tests()}, {kind}")


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Exclude all objects that exist before a module from garbage collection.

    A run collects garbage before it measures memory, which takes 0.3 s with all imported libraries and 0.02 s without.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """The seed of sizes and inputs; printed, so that BYWAY_TEST_SEED can repeat a failure."""
    import torch

    value = seed_of_the_tests()
    print(f"BYWAY_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (BYWAY_DATA, default ../shared/data); the test is skipped if it does not exist."""
    folder = Path(os.environ.get("BYWAY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set BYWAY_DATA")
    return folder
