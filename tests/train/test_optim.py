"""Schedule, order and generators against transformers and hand-made numbers."""

from __future__ import annotations

import importlib
import random

import numpy as np
import pytest
import torch

import byway
from byway.errors import ConfigError, DataError
from byway.recipe.sections import Train
from byway.train import randomness
from byway.train.optim import Schedule, warmup_steps
from byway.train.order import Order
from byway.train.reporting.log import curve_png, finite, running_mean


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_after_the_warmup_the_rate_is_that_of_transformers(kind: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=50)
    ours = Schedule(kind, 7, 50)
    for step in range(50):
        if step >= 7:
            assert ours.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_warmup_rises_in_equal_parts_and_no_update_has_rate_zero() -> None:
    constant = Schedule("constant", 4, 10)
    assert [constant.factor(s) for s in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    for kind in ("cosine", "linear", "constant"):
        for warmup in (0, 1, 9):
            assert all(0 < Schedule(kind, warmup, 10).factor(s) <= 1 for s in range(10))


def test_the_warmup_is_a_share_of_the_steps_or_a_number_that_must_fit() -> None:
    assert warmup_steps(Train(warmup_ratio=0.1), 41) == 5
    assert warmup_steps(Train(warmup_ratio=0.9), 1) == 0
    assert warmup_steps(Train(warmup_steps=3), 4) == 3
    with pytest.raises(ConfigError, match="never end"):
        warmup_steps(Train(warmup_steps=4), 4)


def test_every_row_is_in_each_epoch_once_and_the_total_is_known_up_front() -> None:
    lengths = [3, 9, 4, 7, 5, 8, 2, 6, 3, 4]
    order = Order(lengths, Train(epochs=2.5, rows_per_step=3), micro_tokens=12, pack=True)
    assert order.total == 4 + 4 + 2
    epoch, position, seen = 0, 0, list[list[int]]()
    for _ in range(order.total):
        epoch, position, step = order.next(epoch, position)
        seen.append([i for micro in step for i in micro])
        position += 1
    for first in (0, 4):
        assert sorted(i for rows in seen[first : first + 4] for i in rows) == list(range(10))
    assert seen[:4] != seen[4:8]
    assert Order(lengths, Train(max_steps=7, rows_per_step=3), micro_tokens=12, pack=True).total == 7


def test_no_step_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="0 optimizer steps"):
        Order([], Train(epochs=1, rows_per_step=3), micro_tokens=12, pack=True)


def test_generators_go_on_as_if_nothing_had_been_drawn(seed: int) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    randomness.seed(seed)
    first = draw()
    tensors, plain = randomness.snapshot()
    second = draw()
    with randomness.preserved():
        third = draw()
    randomness.restore(tensors, plain)
    assert draw() == second and draw() == third and first != second
    randomness.seed(seed)
    assert draw() == first


def test_what_is_no_number_is_null_and_marked() -> None:
    assert finite({"loss": float("nan"), "step": 3}) == {"loss": None, "step": 3, "nonfinite": True}
    assert finite({"loss": 1.0, "note": None}) == {"loss": 1.0, "note": None}


def test_the_curve_is_drawn_from_few_and_many_rows_without_touching_pyplot() -> None:
    import sys

    few = [{"step": 1, "loss": 2.0}]
    many = [{"step": s, "loss": 2.0 / s} for s in range(1, 60)] + [{"step": 9, "loss": None}, {"eval": True, "step": 30, "loss": 0.5}]
    before = "matplotlib.pyplot" in sys.modules
    one, two = curve_png(few), curve_png(many, best_step=30)
    assert one.startswith(b"\x89PNG") and two.startswith(b"\x89PNG") and one != two
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_byway_train_is_callable_whatever_was_imported_before() -> None:
    importlib.import_module("byway.train.loop")
    with pytest.raises(ConfigError, match="does not exist"):
        byway.train("no-such-recipe.yaml")
