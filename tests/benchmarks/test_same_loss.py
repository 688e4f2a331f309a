"""The comparison of runs with and without levers: what it computes, and one tiny run of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def same_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/same_loss.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("same_loss", "harness", "machine", "learning", "learning_page"):
        sys.modules.pop(name, None)
    return importlib.import_module("same_loss")


def test_differences_and_spread_are_those_of_the_numbers(same_loss: Any) -> None:
    runs = [
        {"levers": {"losses": [3.0, 2.0], "held_out": 2.5}, "plain": {"losses": [3.0, 2.25], "held_out": 2.0}},
        {"levers": {"losses": [3.0, 2.0], "held_out": 3.0}, "plain": {"losses": [3.125, 2.0], "held_out": 3.0}},
    ]
    found = same_loss.compared(runs)
    assert found["largest_difference_of_a_step"] == 0.25
    assert found["largest_difference_held_out"] == 0.5
    assert found["mean_held_out_levers"] == 2.75
    assert found["mean_held_out_plain"] == 2.5
    assert found["deviation_of_seeds_plain"] == pytest.approx(0.5**0.5)


def test_levers_do_not_change_what_a_small_real_model_learns(same_loss: Any, data_dir: Path) -> None:
    model = str(data_dir / "stories260k" / "hf")
    with_levers, held_out, said = same_loss.curve(model, 0, 4, data_dir, {})
    plainly, held_out_plain, said_plain = same_loss.curve(model, 0, 4, data_dir, same_loss.PLAIN)
    assert "pack on" in said and "labels_only on" in said
    assert "pack off" in said_plain and "labels_only off" in said_plain
    assert with_levers == pytest.approx(plainly, rel=1e-5)
    assert held_out == pytest.approx(held_out_plain, rel=1e-5)
    assert with_levers[-1] < with_levers[0]
