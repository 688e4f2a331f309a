"""LoRA on chats: Byway beside peft with a plain loop, TRL's SFTTrainer as it is, and TRL with the best settings of a list.

    python benchmarks/train_chat.py [--quick] [--dtype fp32|bf16] [--length ragged|fixed] [--variants byway,peft,trl,trl-best]
    python benchmarks/train_chat.py --grid                                   # try TRL's settings, keep the best
    python benchmarks/train_chat.py --device cuda --dtype bf16 --model llama-1b-shape

SmolLM2-135M-Instruct, the first 200 chats of oasst1-chat (``--data``), at most 1024 tokens a row, rank 16 on all linear maps, 4 rows in an
optimizer step, the same rows in the same order, the same first adapter, AdamW and threads for all. Byway is what a user runs: a recipe
through ``byway.train``, its whole loop included. ``tok/s`` are real tokens (no padding) per second; the peak is that of the fresh process.
``byway-lean`` computes cheap activations again, ``byway-same`` multiplies in the dtype of the base where that is emulated (for its memory).
``--length fixed``: rows of 256 tokens that are learned whole, where nothing is padded and nothing can be left out.

First the losses of the warm-up steps are compared: variants that compute different things are not compared in speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chats
import floor
import peers
import runs
from harness import RESULTS, Gate, Outcome, Variant, call, measure, table, write
from machine import slow_bf16
from shapes import SHAPES, write_random

SCRIPT = Path(__file__)
PACKAGES = ("byway", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
BUILT_IN = "smollm2-135m-instruct"
RANK, ALPHA, RATE, SEED, LENGTH = 16, 32, 2e-4, 0, 1024
NO_CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": False}
GROUPS = 12
"""The rows last for so many groups: the reference is repeated in each (see harness.py)."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far the losses of the first step may be apart."""
MEMORY_MB = {"byway": 4000, "peft": 11000, "trl": 6000, "trl-fp32": 6000, "trl-best": 7500}
"""What a variant is thought to need, so that the machine is not overfilled."""


# ---------------------------------------------------------------- workers


def prepare(gate: Gate, settings: Mapping[str, Any]) -> None:
    """The base's directory, the first adapter, the rows of the run in both orders, and the shape of the model."""
    import byway
    from byway.base.builtin.fetch import built_in_directory
    from byway.train import randomness

    folder, model = Path(settings["folder"]), settings["model"]
    base = built_in_directory() if model == BUILT_IN else write_random(model, folder / "base", settings["dtype"])
    shape = floor.shape_of(base, RANK)
    rows = chats.make_rows(
        Path(settings["data"]), model, settings["max_length"], fixed=settings["length"] == "fixed", vocabulary=shape.vocabulary
    )
    chosen, described = chats.representative(rows, settings["steps"])
    steps = chats.sequence(chosen, settings["warmup"], settings["repetitions"] * GROUPS)
    flat = [row for step in steps for row in step]
    loaded, tokenizer = byway.load_base(str(base), settings["dtype"], device_map="cpu")
    randomness.seed(SEED)
    adapter = byway.attach(loaded, byway.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear"), tokenizer=tokenizer)
    gate.send(
        "answer",
        base=str(base),
        shape=shape.as_json(),
        workload=described,
        lengths=[row.tokens for step in chosen for row in step],
        labels=sum(row.learned for step in chosen for row in step),
        step_tokens=[sum(row.tokens for row in step) for step in steps],
        rows=str(chats.save_rows(folder / "rows.jsonl", flat)),
        byway_rows=str(chats.save_rows(folder / "byway.jsonl", chats.for_byway(flat, SEED))),
        adapter=str(adapter.save(folder / "first")),
    )


def recipe_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a user would write; ``settings["engine"]``, ``["compute"]``: what is not left to itself."""
    return {
        "base": {key: settings[key] for key in ("dtype", "device", "compute") if key in settings} | {"model": settings["base"]},
        "method": {"name": "lora", "rank": RANK, "alpha": ALPHA, "targets": "all-linear"},
        "data": {"train": settings["byway_rows"], "task": "text", "max_length": settings["max_length"]},
        "train": {"rows_per_step": chats.BATCH, "learning_rate": RATE, "schedule": "constant", "warmup_steps": 0, "seed": SEED}
        | {"threads": settings["threads"]},
        "engine": dict(settings.get("engine", {})),
        "output": str(Path(settings["folder"]) / "run"),
    }


def byway_train(gate: Gate, settings: Mapping[str, Any]) -> None:
    """The recipe through ``byway.train``."""
    runs.byway_run(gate, {**settings, "recipe": recipe_of(settings)})


WORKERS = {"prepare": prepare, "byway": byway_train, "peft": peers.peft_loop, "trl": peers.trl, "floor": floor.serve}


# ---------------------------------------------------------------- the run


def variants_of(given: argparse.Namespace, common: Mapping[str, Any], folder: Path) -> list[Variant]:
    """peft first: it is what everything is compared with."""
    best = best_of_grid(given)
    grid = {f"trl, {name}": NO_CHECKPOINTS | dict(settings) for name, settings in tried(given).items()}
    named: dict[str, dict[str, Any]] = {
        "peft": {"worker": "peft"},
        "byway": {"worker": "byway"},
        "byway-lean": {"worker": "byway", "engine": {"recompute": "on"}},
        "byway-same": {"worker": "byway", "compute": "same"},
        "trl": {"worker": "trl", "trl": {}},
        "trl-fp32": {"worker": "trl", "trl": {"bf16": False}},
        "trl-best": {"worker": "trl", "trl": dict(best["settings"])},
    } | {name: {"worker": "trl", "trl": dict(settings)} for name, settings in grid.items()}
    wanted = ["peft", *grid] if given.grid else given.variants.split(",")
    unknown = [name for name in wanted if name not in named]
    if unknown:
        raise SystemExit(f"--variants: there is no {unknown[0]!r}; there are: {', '.join(named)}")
    if "peft" in wanted:
        wanted = ["peft", *(name for name in wanted if name != "peft")]
    found = [
        Variant(name, {**common, "folder": str(folder / f"{number}"), **named[name]}, MEMORY_MB.get(name, 7000))
        for number, name in enumerate(wanted)
    ]
    work = {"worker": "floor", "tokens": min(int(sum(common["lengths"]) / common["steps"]), 2048)}
    return [*found, Variant("floor", {**common, **work}, 1500)]


def results_name(given: argparse.Namespace, *, grid: bool) -> str:
    """One file for each kind of run."""
    where = "" if given.model == BUILT_IN and given.device == "cpu" else f"_{given.device}_{given.model}"
    long = "" if given.max_length == LENGTH or grid else f"_{given.max_length}"
    return f"train_chat{'_grid' if grid else ''}{where}_{given.dtype}_{given.length}{long}"


def tried(given: argparse.Namespace) -> Mapping[str, Mapping[str, Any]]:
    """The settings of the grid that make sense here: bf16 is left out where it is only emulated, unless it is what is asked about."""
    if given.device == "cuda" or given.dtype == "bf16" or not slow_bf16():
        return peers.GRID
    left = [name for name, settings in peers.GRID.items() if settings.get("bf16", True)]
    if given.grid:
        print(f"left out of the grid: {'; '.join(left)}. {slow_bf16()}")
    return {name: settings for name, settings in peers.GRID.items() if name not in left}


def best_of_grid(given: argparse.Namespace) -> dict[str, Any]:
    """The fastest of TRL's settings, against peft, when ``--grid`` was last run like this; else the first of the list."""
    path = RESULTS / f"{results_name(given, grid=True)}.json"
    if path.is_file():
        return json.loads(path.read_text())["best"]
    first = next(iter(peers.GRID))
    return {"name": first, "settings": NO_CHECKPOINTS | dict(peers.GRID[first]), "grid": "not run"}


def check_losses(outcomes: Mapping[str, Outcome], dtype: str) -> dict[str, Any]:
    """The losses of the warm-up steps side by side; SystemExit if Byway's first one is not peft's."""
    losses = {name: o.ready["losses"] for name, o in outcomes.items() if "losses" in o.ready}
    for name, values in losses.items():
        print(f"loss of the first steps, {name}: {', '.join(f'{value:.6f}' for value in values)}")
    if {"byway", "peft"} <= set(losses):
        apart = abs(losses["byway"][0] - losses["peft"][0])
        print(f"byway and peft are {apart:.1e} apart in the first step")
        if apart > TOLERANCE[dtype]:
            raise SystemExit(f"byway and peft do not compute the same thing: {apart:.1e} is more than {TOLERANCE[dtype]:.0e}")
    return losses


def show(outcomes: Mapping[str, Outcome], floor_rate: float) -> str:
    """The table; ratios against the first variant, repetition by repetition."""
    first, reference = next(iter(outcomes.items()))
    rows: list[list[str]] = []
    for name, o in outcomes.items():
        if o.error or name == "floor":
            continue
        against = ["-"] * 3
        if not reference.error:
            against = [f"{o.ratio(reference):.2f}", f"{o.ratio(reference, by='cpu'):.2f}", f"{reference.peak_mb / o.peak_mb:.2f}"]
        share = f"{o.rate() / floor_rate:.0%}"
        memory = [f"{o.peak_mb:,}", f"{o.training_peak_mb:,}"]
        rows.append([name, f"{o.rate():.0f}", f"{o.rate(by='cpu'):.0f}", *against, *memory, share, f"{o.median('foreign'):.0%}"])
    header = ["", "tok/s", "tok/CPU s", f"× {first}", "× by CPU", "memory ÷", "peak MB", "in training", "of the floor", "others' CPU"]
    return table(header, rows)


def summary(outcomes: Mapping[str, Outcome], floor_rate: float) -> dict[str, Any]:
    """The table's numbers."""
    reference = next(iter(outcomes.values()))
    found: dict[str, Any] = {}
    for name, o in outcomes.items():
        if o.error or name == "floor":
            continue
        found[name] = {"tokens_per_second": round(o.rate(), 2), "tokens_per_cpu_second": round(o.rate(by="cpu"), 2)}
        found[name] |= {"peak_mb": o.peak_mb, "share_of_floor": round(o.rate() / floor_rate, 3)}
        if not reference.error:
            ratios = o.ratios(reference)
            found[name] |= {"ratio": round(o.ratio(reference), 3), "ratio_by_cpu": round(o.ratio(reference, by="cpu"), 3)}
            found[name] |= {"ratio_from": round(min(ratios), 3), "ratio_to": round(max(ratios), 3)}
            found[name] |= {"memory_ratio": round(reference.peak_mb / o.peak_mb, 3)}
    return found


def options_of(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every worker is told."""
    keys = ("model", "dtype", "length", "device", "threads", "steps", "warmup", "repetitions", "max_length")
    return {key: vars(given)[key] for key in keys} | {"data": str(given.data), "folder": str(folder), "seed": SEED, "learning_rate": RATE}


def run(given: argparse.Namespace, folder: Path) -> int:
    """Everything once: prepare, measure, check, show, write."""
    options = options_of(given, folder)
    prepared = call(SCRIPT, {**options, "worker": "prepare"}, threads=given.threads)
    shape = floor.Shape.from_json(prepared["shape"])
    work = floor.Work(tuple(prepared["lengths"]), prepared["labels"], passes=given.steps)
    print(f"{given.model}, {given.dtype}, {given.length}, {given.threads} threads, {work.tokens} real tokens a repetition")
    print(prepared["workload"])
    variants = variants_of(given, {**options, **prepared, "tokens": work.tokens}, folder)
    outcomes = measure(SCRIPT, variants, repetitions=given.repetitions, threads=given.threads, say=lambda text: print(text, flush=True))
    losses = check_losses(outcomes, given.dtype)
    peak = floor.largest(outcomes["floor"].repetitions)
    least = floor.floor_seconds(work, shape, peak, given.dtype)
    found = summary(outcomes, work.tokens / least)
    print(f"\n{show(outcomes, work.tokens / least)}\n\nfloor: {least:.2f} s a repetition, {work.tokens / least:.0f} tok/s")
    print(f"({peak['gflops']:.0f} GFLOP/s, {peak['bandwidth']:.0f} GB/s, {work.flop(shape)['all'] / work.tokens / 1e9:.3f} GFLOP a token)")
    facts: dict[str, Any] = {"settings": {**options, "folder": None, "data": None, "rank": RANK, "alpha": ALPHA}}
    facts |= {"workload": prepared["workload"], "summary": found, "losses": losses}
    facts |= {"floor": {"seconds": least, "flop": work.flop(shape), "peak": peak, "shape": prepared["shape"]}}
    facts |= {"variants": {v.name: dict(v.settings).get("trl", {}) for v in variants}, "all": {n: o.facts() for n, o in outcomes.items()}}
    if given.grid:
        # by the ratio: the groups run one after the other, on a machine whose speed changes
        name = max((n for n in found if n.startswith("trl, ")), key=lambda n: found[n]["ratio"]).removeprefix("trl, ")
        facts["best"] = {"name": name, "settings": NO_CHECKPOINTS | dict(peers.GRID[name]), "tried": list(tried(given))}
        print(f"\nbest of the grid: {name}")
    else:
        facts["trl_best"] = best_of_grid(given)
    what = "LoRA r16 on all linear maps, real tokens per second and peak memory; medians of interleaved repetitions, fresh processes"
    print(f"written to {write(results_name(given, grid=given.grid), what, facts, packages=PACKAGES, output=given.output)}")
    return 1 if any(o.error for o in outcomes.values()) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``--quick`` and the random shapes change the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--length", choices=("ragged", "fixed"), default="ragged")
    parser.add_argument("--variants", default="peft,byway,trl,trl-best", help="separated by commas; peft is the reference")
    parser.add_argument("--grid", action="store_true", help="TRL with each of its settings in the list; the best is kept for trl-best")
    parser.add_argument("--model", choices=(BUILT_IN, *SHAPES), default=BUILT_IN)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps in a repetition (3; quick: 1)")
    parser.add_argument("--warmup", type=int, default=None, help="optimizer steps before the first repetition (2; quick: 1)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=LENGTH)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", chats.DATA)))
    parser.add_argument("--quick", action="store_true", help="one step a repetition, one to warm up")
    parser.add_argument("--output", type=Path, default=None, help="the results file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.steps = given.steps or (1 if given.quick else 3)
    given.warmup = given.warmup or (1 if given.quick else 2)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.worker:
        settings = json.loads(given.worker)
        WORKERS[settings["worker"]](Gate(), settings)
        return 0
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("--device cuda needs an NVIDIA GPU that torch sees (a CUDA build of torch and its driver); here there is none.")
            print("The same code runs on a CPU with: --device cpu --model tiny-shape")
            return 2
    if given.dtype == "bf16" and given.device == "cpu" and slow_bf16():
        print(slow_bf16(), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as folder:
        return run(given, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
