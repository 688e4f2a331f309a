"""A resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from byway.train import Stopped, train
from byway.train.reporting.events import Evaluating, Event, Stepped
from tests.train.conftest import RecipeMaker, assert_same_run, interrupt_at, losses

pytestmark = pytest.mark.usefixtures("quick_picture")


@pytest.mark.parametrize("settings", [{}, {"eval_every": 2, "save_every": 3}, {"rows_per_step": None, "tokens_per_step": 60}])
def test_interrupted_at_any_step_and_resumed_equals_uninterrupted(make_recipe: RecipeMaker, seed: int, settings: dict[str, Any]) -> None:
    """With dropout, in the middle of epochs, twice, also at a step where an evaluation is due."""
    whole = train(make_recipe("whole", train=settings))
    draw, total = random.Random(seed), whole.metrics["step"]
    stops = sorted(draw.sample(range(1, total), 2))
    print("interrupted at", stops)
    recipe = make_recipe("pieces", train=settings)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(recipe, on_event=interrupt_at(stops[0]))
    assert isinstance(caught.value, Stopped) and caught.value.exit_code == 130
    assert caught.value.checkpoint is not None and caught.value.checkpoint.name == f"step-{stops[0]}"
    with pytest.raises(Stopped):
        train(recipe, resume=True, on_event=interrupt_at(stops[1]))
    torch.manual_seed(draw.randrange(10**6))  # the result must not depend on earlier draws
    resumed = train(recipe, resume=True)
    assert_same_run(whole.directory, resumed.directory)
    assert {k: v for k, v in resumed.metrics.items() if k != "seconds"} == {k: v for k, v in whole.metrics.items() if k != "seconds"}


def test_a_stop_during_an_evaluation_makes_it_again_at_the_resume(make_recipe: RecipeMaker) -> None:
    settings = {"micro_batch_tokens": 16}  # several evaluation batches
    whole = train(make_recipe("whole", train=settings))

    def watch(event: Event) -> None:
        if isinstance(event, Evaluating) and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = make_recipe("pieces", train=settings)
    with pytest.raises(Stopped) as caught:
        train(recipe, on_event=watch)
    assert caught.value.exit_code == 143
    assert not any(row.get("eval") for row in losses(Path(recipe["output"])))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


def test_a_second_signal_does_not_wait_and_handlers_are_put_back(make_recipe: RecipeMaker) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def twice(event: Event) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    recipe = make_recipe()
    with pytest.raises(Stopped) as caught:
        train(recipe, on_event=twice)
    assert caught.value.checkpoint is None and caught.value.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    train(recipe)  # nothing was saved, so the directory counts as empty


def test_a_finished_run_can_be_resumed_and_made_longer(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(train={"schedule": "constant", "epochs": 1}))
    shutil.rmtree(run.directory / "adapter")
    again = train(make_recipe(train={"schedule": "constant", "epochs": 1}), resume=True)
    assert (again.directory / "adapter").is_dir() and again.metrics["step"] == 3
    longer = train(make_recipe(train={"schedule": "constant", "epochs": 2, "warmup_ratio": None, "warmup_steps": 1}), resume=True)
    whole = train(make_recipe("whole", train={"schedule": "constant", "epochs": 2, "warmup_ratio": None, "warmup_steps": 1}))
    assert_same_run(whole.directory, longer.directory)
