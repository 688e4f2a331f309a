"""Whether a method is said to learn: the margin by hand, unfinished seeds, and recipes that Byway accepts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from byway.recipe.recipe import Recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning  # pyright: ignore[reportMissingImports]

    yield learning
    for name in ("learning", "learning_page", "machine"):
        sys.modules.pop(name, None)


def _run(seed: int, score: float) -> dict[str, Any]:
    recipe = {"train": {"epochs": 1, "learning_rate": 2e-3}}
    return {
        "kind": "encoder",
        "method": "lora",
        "seed": seed,
        "trained": 10,
        "head": 5,
        "score": score,
        "cpu_seconds": 60.0,
        "memory_mb": 600.0,
        "recipe": recipe,
    }


def _page(learning: Any, scores: list[float]) -> str:
    bar = {"pooled": [0.70, 0.72, 0.74], "first": [0.7] * 3, "mean": [0.8] * 3}
    machine, versions = {"cpu": "a cpu"}, {"torch": "2", "transformers": "5"}
    runs = {str(seed): _run(seed, score) for seed, score in enumerate(scores)}
    results = {"probe": bar, "base_loss": 2.5, "runs": runs, "machine": machine, "versions": versions}
    page: str = learning.page(results, ("lora",), ())
    return page


def test_the_margin_is_what_is_left_above_twice_the_larger_spread(learning: Any) -> None:
    # deviations by hand: 0.02 for the bar; 0.03 and 0.01 for the methods
    line = next(line for line in _page(learning, [0.77, 0.80, 0.83]).splitlines() if line.startswith("| `lora`"))
    assert "| 80.0 ± 3.0 | +8.0 | +2.0 |" in line
    line = next(line for line in _page(learning, [0.72, 0.73, 0.74]).splitlines() if line.startswith("| `lora`"))
    assert "| 73.0 ± 1.0 | +1.0 | -3.0 |" in line


def test_a_method_without_all_its_seeds_has_no_margin(learning: Any) -> None:
    line = next(line for line in _page(learning, [0.80]).splitlines() if line.startswith("| `lora`"))
    assert "| 80.0 (1 of 3 seeds) | +8.0 | – |" in line


def test_every_run_is_a_recipe_that_byway_accepts(learning: Any, tmp_path: Path, data_dir: Path) -> None:
    for kind, table in (("encoder", learning.ENCODER), ("generative", learning.GENERATIVE)):
        for method in table:
            recipe = Recipe.from_dict(learning.recipe_of(kind, method, 0, data_dir, "encoder", tmp_path))
            assert recipe.train.learning_rate == table[method]["learning_rate"]
    rows = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(row)["prompt"] for row in rows}) == learning.PHRASES
