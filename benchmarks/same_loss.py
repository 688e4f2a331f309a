"""Do the engine's levers change what is learned? Each seed trains twice: with every lever left to Byway, and with every lever off.

    python benchmarks/same_loss.py [--model smollm2-135m-instruct] [--seeds 3] [--steps 16] [--data DIR]

LoRA, rank 16 on all linear maps, 64 rows of E2E (a table of facts, then a sentence), 24 held-out rows with tables of their own. Both runs
of a seed see the same rows in the same order and start from the same adapter, so they would be equal bit for bit if no lever changed the
order of a sum. What is compared: how far the two are apart in the loss of any step and of the held-out rows, and how far the seeds are
apart among themselves. One process, one thread; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import table, write
from learning import generative_rows, rows_of, write_rows

LEVERS = ("pack", "labels_only", "frontier", "recompute", "share_prefix", "last_layer", "checkpointing")
PLAIN = dict.fromkeys(LEVERS, "off")


def curve(model: str, seed: int, steps: int, data: Path, engine: Mapping[str, str]) -> tuple[list[float], float, str]:
    """The loss of each step, that of the held-out rows at the end, and what the plan says of the engine."""
    import byway
    from byway.train.reporting.events import Event, Planned

    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Planned):
            said.append(event.plan.levers)

    train, held_out = generative_rows(data)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        byway.train(
            {
                "base": {"model": model, "dtype": "fp32"},
                "method": {"name": "lora", "rank": 16, "targets": "all-linear"},
                "data": {
                    "train": write_rows(where / "train.jsonl", train),
                    "eval": write_rows(where / "eval.jsonl", held_out),
                    "task": "text",
                    "max_length": 128,
                },
                "train": {"max_steps": steps, "rows_per_step": 4, "learning_rate": 1e-3, "seed": seed, "eval_every": 1_000_000},
                "engine": dict(engine),
                "output": str(where / "run"),
            },
            on_event=listen,
        )
        rows = rows_of(where / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if not row.get("eval")]
    return losses, [row["loss"] for row in rows if row.get("eval")][-1], said[0]


def compared(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is found: differences between the two runs of a seed, and the spread of the seeds."""
    apart = [abs(a - b) for run in runs for a, b in zip(run["levers"]["losses"], run["plain"]["losses"], strict=True)]
    held_out = {kind: [run[kind]["held_out"] for run in runs] for kind in ("levers", "plain")}
    return {
        "largest_difference_of_a_step": max(apart),
        "largest_difference_held_out": max(abs(a - b) for a, b in zip(held_out["levers"], held_out["plain"], strict=True)),
        "mean_held_out_levers": statistics.mean(held_out["levers"]),
        "mean_held_out_plain": statistics.mean(held_out["plain"]),
        "deviation_of_seeds_plain": statistics.stdev(held_out["plain"]) if len(runs) > 1 else 0.0,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a built-in model or a directory")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    )
    parser.add_argument("--output", type=Path, default=None, help="the results file")
    return parser.parse_args()


def main() -> None:
    """Train, compare, write, show."""
    import torch

    given = arguments()
    torch.set_num_threads(1)
    runs = []
    for seed in range(given.seeds):
        found: dict[str, Any] = {"seed": seed}
        for kind, engine in (("levers", {}), ("plain", PLAIN)):
            losses, held_out, said = curve(given.model, seed, given.steps, given.data, engine)
            found[kind] = {"losses": losses, "held_out": held_out, "plan": said}
        runs.append(found)
        print(f"seed {seed}: held out {found['levers']['held_out']:.6f} with levers, {found['plain']['held_out']:.6f} plain", flush=True)
    name = "/".join(Path(given.model).parts[-2:])  # of a directory not where it lies
    facts = {"model": name, "steps": given.steps, "compared": compared(runs), "runs": runs}
    packages = ("byway", "torch", "transformers")
    path = write("same_loss", "the loss with every lever and with none", facts, packages=packages, output=given.output)
    print(table(("", "value"), [(name.replace("_", " "), f"{value:.3g}") for name, value in facts["compared"].items()]))
    print(json.dumps(str(path)))


if __name__ == "__main__":
    main()
