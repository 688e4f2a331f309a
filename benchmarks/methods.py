"""Step time and peak memory of every method, on one model, the same rows and the same loop.

    python benchmarks/methods.py [--quick] [--model small-shape] [--only lora,dora]

A random Llama shape (``small-shape``: 12 layers of width 288, 8,192 words; or another of ``shapes.py``), rows as long as the chats of
oasst1 (at most 512 tokens), 4 in a step, each method with its defaults and LoRA's relatives at rank 16 on all linear maps. Every lever is
left to Byway. ``full`` trains everything and is what the others are compared with in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chats
import runs
from harness import Gate, call, measure, write
from runs import Case
from shapes import SHAPES, write_random

SCRIPT = Path(__file__)
RANKED = {"rank": 16, "targets": "all-linear"}
FIELDS: Mapping[str, Mapping[str, Any]] = {"lora": RANKED, "dora": RANKED, "adalora": {"targets": "all-linear"}}
"""What is set; everything else is a method's default."""
STEPS, WARMUP, GROUPS = 4, 2, 16


def prepare(gate: Gate, settings: Mapping[str, Any]) -> None:
    """A random base and the rows of the run."""
    folder = Path(settings["folder"])
    base = write_random(settings["model"], folder / "base", "fp32")
    vocabulary = SHAPES[settings["model"]][1]["vocab_size"]
    rows = chats.make_rows(Path(), settings["model"], settings["max_length"], fixed=False, vocabulary=vocabulary)
    chosen, described = chats.representative(rows, STEPS)
    steps = chats.sequence(chosen, WARMUP, settings["repetitions"] * GROUPS)
    flat = [row for step in steps for row in step]
    path = chats.save_rows(folder / "rows.jsonl", chats.for_byway(flat, 0))
    gate.send("answer", base=str(base), rows=str(path), workload=described, step_tokens=[sum(row.tokens for row in step) for step in steps])


def cases(only: str) -> list[Case]:
    """Every method there is; LoRA first, it is the reference."""
    from byway.methods import names

    order = sorted(names(), key=lambda name: (name != "lora", name == "full", name))
    return runs.chosen([Case(name, {"method": {"name": name, **FIELDS.get(name, {})}}) for name in order], only)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_options(parser, threads=1)
    parser.add_argument("--model", choices=tuple(SHAPES), default="small-shape")
    parser.add_argument("--max-length", type=int, default=None, help="tokens of the longest row (512; quick: 192)")
    given = parser.parse_args(arguments)
    if given.worker:
        settings = json.loads(given.worker)
        (prepare if settings["worker"] == "prepare" else runs.byway_run)(Gate(), settings)
        return 0
    length = given.max_length or (192 if given.quick else 512)
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as name:
        folder = Path(name)
        own = {"worker": "prepare", "model": given.model, "max_length": length, "repetitions": given.repetitions, "folder": name}
        prepared = call(SCRIPT, own)
        common: dict[str, Any] = {
            "base": {"model": prepared["base"], "dtype": "fp32", "device": "cpu"},
            "method": {"name": "lora"},
            "data": {"train": prepared["rows"], "task": "text", "max_length": length},
            "train": {"rows_per_step": chats.BATCH, "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0}
            | {"threads": given.threads},
        }
        settings = {"warmup": WARMUP, "steps": STEPS, "step_tokens": prepared["step_tokens"]}
        variants = [runs.variant(common, case, folder, settings, 1500) for case in runs.possible(common, cases(given.only))]
        print(f"{given.model}, fp32, {given.threads} threads, rows of at most {length} tokens; {prepared['workload']}")
        outcomes = measure(SCRIPT, variants, repetitions=given.repetitions, threads=given.threads)
    found = runs.summary(outcomes, "lora")
    print(f"\n{runs.cases_table(found, 'lora', plans=True)}\n")
    facts = {"settings": {"model": given.model, "threads": given.threads, "max_length": length, "batch": chats.BATCH, "steps": STEPS}}
    facts |= {"workload": prepared["workload"], "summary": found, "all": {n: o.facts() for n, o in outcomes.items()}}
    what = "four training steps with each method: medians of interleaved repetitions, fresh processes"
    print(f"written to {write('methods', what, facts, packages=('byway', 'torch', 'transformers'), output=given.output)}")
    return 1 if any(o.error for o in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
