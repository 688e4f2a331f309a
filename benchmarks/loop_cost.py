"""What the training loop costs itself: the share of a step that is neither the loss, nor its backward pass, nor the optimizer.

    python benchmarks/loop_cost.py [--steps 40] [--rows 8] [--tokens 64]

A Llama-shaped random model of 13 million numbers, LoRA rank 8, rows of ids that are at most ``--tokens`` long; CPU seconds of one thread,
the median of the steps after the first five. What is left: putting rows into a batch, the order of the rows, counting, the line in
metrics.jsonl, the events, the look at memory. ``Task.loss`` and the optimizer's calls are timed where the loop calls them.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import table, write
from learning import write_rows
from shapes import write_random

MODEL, WARMUP = "small-shape", 5


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the longest row")
    parser.add_argument("--output", type=Path, default=None, help="the results file")
    return parser.parse_args(given)


class Clock:
    """CPU seconds of each step, and of the calls in it that are the work."""

    def __init__(self) -> None:
        self.work = 0.0
        self.steps: list[tuple[float, float]] = []

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted as work."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.work += time.process_time() - began

        return wrapped

    def stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step`, counted as a step."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.work, began = 0.0, time.process_time()
            step(*args, **kwargs)
            self.steps.append((time.process_time() - began, self.work))

        return wrapped


def run(given: argparse.Namespace, clock: Clock) -> int:
    """Train once; returns how many numbers the model has."""
    import byway
    from byway.tasks.causal_lm import CausalLM

    loop, optim = (importlib.import_module(f"byway.train.{name}") for name in ("loop", "optim"))
    (running,) = [found for found in vars(loop).values() if isinstance(found, type) and "_step" in vars(found)]
    running._step = clock.stepping(running._step)
    CausalLM.loss = clock.timed(CausalLM.loss)
    for name in ("backward", "norm", "update"):
        setattr(optim.Optimizer, name, clock.timed(vars(optim.Optimizer)[name]))
    draw = random.Random(0)
    rows = []
    for _ in range(given.steps * given.rows):
        ids = [draw.randrange(4, 8000) for _ in range(draw.randint(given.tokens // 4, given.tokens))]
        rows.append({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as name:
        folder = Path(name)
        recipe = {
            "base": {"model": str(write_random(MODEL, folder / "base", "fp32")), "dtype": "fp32"},
            "method": {"name": "lora", "rank": 8},
            "data": {"train": write_rows(folder / "rows.jsonl", rows), "task": "text", "max_length": given.tokens},
            "train": {"rows_per_step": given.rows, "epochs": 1, "threads": 1},
            "output": str(folder / "run"),
        }
        return sum(p.numel() for p in byway.train(recipe).model.parameters())


def main(given: Sequence[str] | None = None) -> int:
    options, clock = arguments(given), Clock()
    numbers = run(options, clock)
    steps = clock.steps[WARMUP:]
    found = {
        "step_ms": 1e3 * statistics.median(whole for whole, _ in steps),
        "loop_ms": 1e3 * statistics.median(whole - work for whole, work in steps),
        "share": statistics.median((whole - work) / whole for whole, work in steps),
    }
    facts = {"model": MODEL, "parameters": numbers, "rows": options.rows, "tokens": options.tokens, "steps": len(steps), "found": found}
    path = write("loop_cost", "what the training loop costs itself", facts, packages=("byway", "torch"), output=options.output)
    print(table(("", "value"), [(name, f"{value:.3g}") for name, value in found.items()]))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
