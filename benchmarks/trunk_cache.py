"""What is saved when the frozen trunk is not run again: the first epoch, later epochs, and the first epoch of the next run.

    python benchmarks/trunk_cache.py [--quick] [--dtype fp32] [--only ladder]

SmolLM2-135M-Instruct and chats of oasst1; a repetition is one epoch. LoRA on the top four layers and Ladder Side-Tuning, live and from the
cache, beside LoRA on all layers, ours (the reference) and peft's. The next run has another learning rate and another seed. The share of the
floor counts only what a cached epoch must still compute: the layers above the cut, the side network, the head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chats
import floor
import peers
import runs
import train_chat
from harness import Gate, Outcome, Variant, call, measure, table, write
from runs import Case
from shapes import SHAPES, write_random

SCRIPT = Path(__file__)
GROUPS = 8
"""The rows last for so many groups: the reference is repeated in each (see harness.py)."""
EVERYWHERE = {"name": "lora", "rank": train_chat.RANK, "alpha": train_chat.ALPHA, "targets": "all-linear"}
LADDER = {"name": "ladder_side_tuning", "reduction": 8}


def upper(layers: int) -> int:
    """How many are trained at the top: four, or one of a model that has few."""
    return 4 if layers > 8 else 1


def prepare(gate: Gate, settings: Mapping[str, Any]) -> None:
    """The base, the first adapter of peft, the rows of an epoch once (Byway) and for all epochs (peft)."""
    import byway
    from byway.base.builtin.fetch import built_in_directory

    folder, model = Path(settings["folder"]), settings["model"]
    base = built_in_directory() if model == train_chat.BUILT_IN else write_random(model, folder / "base", settings["dtype"])
    shape = floor.shape_of(base, train_chat.RANK)
    rows = chats.make_rows(Path(settings["data"]), model, settings["max_length"], fixed=False, vocabulary=shape.vocabulary)
    chosen, described = chats.representative(rows, settings["steps"])
    epoch = [row for step in chosen for row in step]
    loaded, tokenizer = byway.load_base(str(base), settings["dtype"], device_map="cpu")
    adapter = byway.attach(loaded, byway.LoRA(rank=train_chat.RANK, alpha=train_chat.ALPHA, targets="all-linear"), tokenizer=tokenizer)
    gate.send(
        "answer",
        base=str(base),
        shape=shape.as_json(),
        workload=described,
        lengths=[row.tokens for row in epoch],
        labels=sum(row.learned for row in epoch),
        epoch=str(chats.save_rows(folder / "epoch.jsonl", epoch)),
        rows=str(chats.save_rows(folder / "rows.jsonl", epoch * (settings["repetitions"] * GROUPS + 1))),
        adapter=str(adapter.save(folder / "first")),
    )


def cases(layers: int, caches: Path) -> list[Case]:
    """Live and cached, by method; the cached ones have a directory each."""
    top = EVERYWHERE | {"layers": f"{layers - upper(layers)}-"}
    return [
        Case("lora, all layers", {"method": EVERYWHERE, "engine": {"cache": "off"}}),
        Case("lora, top layers, live", {"method": top, "engine": {"cache": "off"}}),
        Case("lora, top layers, cached", {"method": top, "engine": {"cache": str(caches / "top")}}),
        Case("ladder, live", {"method": LADDER, "engine": {"cache": "off"}}),
        Case("ladder, cached", {"method": LADDER, "engine": {"cache": str(caches / "ladder")}}),
    ]


def next_runs(common: Mapping[str, Any], built: Sequence[Case]) -> list[Case]:
    """The cached cases once more, as another run would have them."""
    train = {"learning_rate": 1e-3, "seed": 1}
    return [Case(f"{case.name}, next run", {**case.sections, "train": train}) for case in built if case.name.endswith("cached")]


def first_epochs(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Wall seconds of each variant's first epoch, with whatever was built for it."""
    return {name: o.ready["warmup_wall"] for name, o in outcomes.items() if "warmup_wall" in o.ready}


def least(name: str, shape: floor.Shape, work: floor.Work, peak: Mapping[str, float], trained: int, dtype: str) -> float:
    """The floor of one epoch of this variant, in seconds. A live trunk below the cut is only run forward."""
    if name.startswith("ladder"):
        part, below = shape.part(0, trained), shape.layers
    elif "top" in name:
        part, below = shape.part(upper(shape.layers), trained), shape.layers - upper(shape.layers)
    else:
        return floor.floor_seconds(work, shape, peak, dtype)
    forward = work.flop(shape.part(below, 0)) if "live" in name else {"trunk": 0.0, "attention": 0.0}
    flop = work.flop(part)["all"] + forward["trunk"] / 2 + forward["attention"] / 3
    return flop / (peak["gflops"] * 1e9)


def report(
    outcomes: Mapping[str, Outcome], later: Mapping[str, Outcome], shape: floor.Shape, work: floor.Work, dtype: str
) -> dict[str, Any]:
    """Every variant's numbers, and those of the next run."""
    peak = floor.largest(outcomes["floor"].repetitions)
    found = runs.summary({name: o for name, o in outcomes.items() if name != "floor"}, "lora, all layers")
    first = first_epochs(outcomes)
    rows: list[list[str]] = []
    for name, each in found.items():
        if "error" in each:
            rows.append([name, "failed", *[""] * 6])
            continue
        seconds = least(name, shape, work, peak, int(each["trained"] or shape.lowrank), dtype)
        each |= {"first_epoch": first.get(name), "floor_seconds": seconds, "share_of_floor": round(seconds / each["seconds"], 3)}
        live = found.get(name.replace("cached", "live"))
        if live is not None and live is not each and "error" not in live:
            each["against_live"] = round(live["seconds"] / each["seconds"], 2)
        again = later.get(f"{name}, next run")
        if again is not None and not again.error:
            each["next_run_first_epoch"] = again.ready["warmup_wall"]
        shown = [each.get("first_epoch"), each["seconds"], each.get("next_run_first_epoch")]
        ratios = [str(each.get("ratio", "-")), str(each.get("against_live", "-"))]
        times = ["-" if value is None else f"{value:.2f}" for value in shown]
        rows.append([name, *times, *ratios, f"{each['peak_mb']:,}", f"{each['share_of_floor']:.0%}"])
    header = ["", "epoch 1, s", "later, s", "next run, epoch 1", "× our LoRA", "× live", "peak MB", "of the floor"]
    print(f"\n{table(header, rows)}\n")
    return {"summary": found, "floor": {"peak": peak, "flop_all_layers": work.flop(shape)}}


WORKERS = {"prepare": prepare, "byway": runs.byway_run, "peft": peers.peft_loop, "floor": floor.serve}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_options(parser)
    parser.add_argument("--model", choices=(train_chat.BUILT_IN, *SHAPES), default=train_chat.BUILT_IN)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-length", type=int, default=None, help="tokens of the longest row (1024; quick: 256)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of 4 rows in an epoch (4; quick: 2)")
    given = parser.parse_args(arguments)
    if given.worker:
        settings = json.loads(given.worker)
        WORKERS[settings["worker"]](Gate(), settings)
        return 0
    steps, length = given.steps or (2 if given.quick else 4), given.max_length or (256 if given.quick else 1024)
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as name:
        options: dict[str, Any] = {"model": given.model, "dtype": given.dtype, "max_length": length, "steps": steps, "warmup": steps}
        options |= {"repetitions": given.repetitions, "threads": given.threads, "device": "cpu", "folder": name, "data": str(given.data)}
        options |= {"seed": 0, "learning_rate": train_chat.RATE}
        prepared = call(SCRIPT, {**options, "worker": "prepare"}, threads=given.threads)
        found = run(given, options, prepared, Path(name))
    facts = {"settings": {**options, "folder": None, "data": None}, "workload": prepared["workload"], **found}
    what = "epochs with the trunk run again, kept from the epoch before, and kept from an earlier run: medians of interleaved repetitions"
    print(f"written to {write('trunk_cache', what, facts, packages=train_chat.PACKAGES[:4], output=given.output)}")
    return 0


def run(given: argparse.Namespace, options: Mapping[str, Any], prepared: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Both measurements: the variants beside each other, then the next runs."""
    shape = floor.Shape.from_json(prepared["shape"])
    work = floor.Work(tuple(prepared["lengths"]), prepared["labels"], passes=options["steps"])
    common = train_chat.recipe_of({**options, **prepared, "byway_rows": prepared["epoch"]})
    del common["output"]
    common["train"]["epochs"] = float(options["repetitions"] * GROUPS + 2)
    cached = runs.possible(common, runs.chosen(cases(shape.layers, folder / "cache"), given.only))
    variants = [runs.variant(common, case, folder, options, 4000) for case in cached]
    variants.append(Variant("peft, all layers", {**options, **prepared, "worker": "peft"}, 8000))
    variants.append(Variant("floor", {**options, **prepared, "worker": "floor", "tokens": min(work.tokens, 2048)}, 1500))
    print(f"{given.model}, {given.dtype}, {given.threads} threads, {work.tokens} tokens an epoch; {prepared['workload']}")
    outcomes = measure(SCRIPT, variants, repetitions=given.repetitions, threads=given.threads)
    again = [runs.variant(common, case, folder, options, 4000) for case in next_runs(common, cached)]
    later = measure(SCRIPT, again, repetitions=1, threads=given.threads) if again else {}
    everything = {name: o.facts() for name, o in (outcomes | later).items()}
    return report(outcomes, later, shape, work, given.dtype) | {"all": everything}


if __name__ == "__main__":
    raise SystemExit(main())
