"""Where a training step's CPU time goes: operators of one step of Byway and of peft, and forward time by kind of module.

    python benchmarks/profile_step.py [--max-length 512] [--model ...]    # one thread, CPU seconds; a few minutes at most

The same rows as ``train_chat.py``. Byway runs through ``byway.train``: the profiler goes on after its warm-up steps and off after the next.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peers
import runs
import train_chat
from harness import Gate, call, table

SCRIPT = Path(__file__)
ROWS = 24


class Finish(BaseException):
    """Leaves a training loop that is not ours."""


class Profiled:
    """Stands in for a :class:`harness.Loop`: profiles the step after the warm-up, then sends its table."""

    def __init__(self, gate: Gate, warmup: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.gate, self.left = gate, warmup
        self.facts: dict[str, Any] = {}
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def stepped(self, loss: float, tokens: int) -> None:
        import time

        self.left -= 1
        if self.left == 0:
            self.began = time.process_time()
            self.profiler.start()
        elif self.left < 0:
            self.profiler.stop()
            seconds = time.process_time() - self.began
            rows = sorted(self.profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
            whole = sum(row.self_cpu_time_total for row in rows)
            named = [(row.key, row.count, row.self_cpu_time_total / 1e6, row.self_cpu_time_total / whole) for row in rows[:ROWS]]
            products = [
                e for e in self.profiler.key_averages(group_by_input_shape=True) if e.key in ("aten::mm", "aten::addmm", "aten::bmm")
            ]
            shapes = [(product(e.key, e.input_shapes), e.count, e.self_cpu_time_total / 1e6) for e in products]
            calls = sum(row.count for row in rows)
            self.gate.send("answer", tokens=tokens, loss=loss, cpu=seconds, operators=named, products=shapes, calls=calls, **self.facts)
            raise Finish


def product(key: str, shapes: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """(rows, inner, columns) of a matrix product, the batch of a bmm among its rows."""
    left, right = [s for s in shapes if len(s) >= 2][-2:]
    return (left[0] * left[1] if key == "aten::bmm" else left[0]), left[-1], right[-1]


def shown_products(products: Sequence[tuple[Sequence[int], int, float]], scale: float) -> list[list[str]]:
    """The twelve kinds that take the most time, with their speed."""
    rows: list[list[str]] = []
    for (m, k, n), count, seconds in sorted(products, key=lambda each: -each[2])[:12]:
        own = seconds * scale
        rows.append([f"{m} x {k} x {n}", f"{count}", f"{own:.3f}", f"{2.0 * m * k * n * count / max(own, 1e-9) / 1e9:.0f}"])
    return rows


def profiled(worker: Callable[[Gate, Mapping[str, Any]], None], gate: Gate, settings: Mapping[str, Any]) -> None:
    """`worker` of train_chat with its loop replaced by one that profiles."""
    from unittest.mock import patch

    def loop(gate: Gate, *, warmup: int, **others: Any) -> Profiled:
        return Profiled(gate, warmup)

    with patch.object(runs, "Loop", loop), patch.object(peers, "Loop", loop):
        try:
            worker(gate, settings)
        except Finish:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args(arguments)
    if known.worker:
        settings = json.loads(known.worker)
        profiled(train_chat.WORKERS[settings["worker"]], Gate(), settings)
        return 0
    given = train_chat.parse(["--quick", "--threads", "1", "--max-length", "512", *rest])
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as folder:
        options = train_chat.options_of(given, Path(folder)) | {"repetitions": 2}
        prepared = call(train_chat.SCRIPT, {**options, "worker": "prepare"})
        common = {**options, **prepared, "tokens": 1}
        print(f"{given.model}, {given.dtype}, one thread; {prepared['workload']}")
        for name in given.variants.split(","):
            extra = {"trl": train_chat.best_of_grid(given)["settings"] if name == "trl-best" else {}}
            worker = "trl" if name.startswith("trl") else name
            found = call(SCRIPT, {**common, **extra, "worker": worker, "folder": str(Path(folder) / name)})
            print(f"\n{name}: {found['cpu']:.2f} CPU s, {found['tokens']} tokens, {found['calls']} operator calls {found.get('plan', '')}")
            # the profiler's seconds are wall time; scaled, so that they add up to the CPU seconds of the step
            scale = found["cpu"] / sum(seconds / share for _, _, seconds, share in found["operators"][:1])
            rows = [[key[:60], f"{count}", f"{seconds * scale:.3f}", f"{share:.1%}"] for key, count, seconds, share in found["operators"]]
            print(table(["operator", "calls", "self CPU s", "share"], rows))
            print(f"\n{table(['matrix product', 'calls', 'CPU s', 'GFLOP/s'], shown_products(found['products'], scale))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
