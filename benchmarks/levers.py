"""Each of the engine's levers off and on: speed and memory of the same training without it, and with nothing else than it.

    python benchmarks/levers.py [--quick] [--model smollm2-135m-instruct] [--dtype fp32] [--only pack,labels]

The rows and settings of ``train_chat.py``. "all" leaves every lever to Byway (auto), "plain" switches all off; "without X" and "only X"
differ from these in one. The levers that act on the upper layers alone are shown with LoRA on the top four layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import chats
import runs
import train_chat
from harness import Gate, call, measure, write
from runs import Case

SCRIPT = Path(__file__)
LORA = {"name": "lora", "rank": train_chat.RANK, "alpha": train_chat.ALPHA, "targets": "all-linear"}


def cases(layers: int) -> list[Case]:
    """Every lever that this version decides by itself, off and alone; then those that are asked for."""
    from dataclasses import fields

    from byway.recipe.sections import Engine

    levers = [f.name for f in fields(Engine) if f.default == "auto"]
    off = dict.fromkeys(levers, "off")
    savings = [name for name in levers if name != "checkpointing"]
    top = LORA | {"layers": f"{layers - min(4, layers - 1)}-"}
    return [
        Case("all", {}),
        Case("plain", {"engine": off}),
        *(Case(f"without {name}", {"engine": {name: "off"}}) for name in savings),
        *(Case(f"only {name}", {"engine": off | {name: "auto"}}) for name in savings),
        Case("with checkpointing", {"engine": {"checkpointing": "on"}}),
        Case("with compile", {"engine": {"compile": "on"}}),
        Case("computed as stored", {"base": {"compute": "same"}}),
        Case("computed in int8", {"base": {"compute": "int8"}}),
        Case("top layers, all", {"method": top}),
        Case("top layers, without frontier", {"method": top, "engine": {"frontier": "off"}}),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_options(parser)
    parser.add_argument("--model", choices=(train_chat.BUILT_IN, *train_chat.SHAPES), default=train_chat.BUILT_IN)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-length", type=int, default=None, help="tokens of the longest row (1024; quick: 192)")
    given = parser.parse_args(arguments)
    if given.worker:
        runs.byway_run(Gate(), json.loads(given.worker))
        return 0
    length = given.max_length or (192 if given.quick else 1024)
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as name:
        folder = Path(name)
        rest = ["--model", given.model, "--dtype", given.dtype, "--max-length", str(length), "--threads", str(given.threads), "--quick"]
        own = train_chat.parse([*rest, "--repetitions", str(given.repetitions), "--data", str(given.data)])
        options = train_chat.options_of(own, folder)
        prepared = call(train_chat.SCRIPT, {**options, "worker": "prepare"}, threads=given.threads)
        common = train_chat.recipe_of({**options, **prepared})
        del common["output"]
        wanted = runs.possible(common, runs.chosen(cases(prepared["shape"]["layers"]), given.only))
        settings = {"warmup": own.warmup, "steps": own.steps, "step_tokens": prepared["step_tokens"]}
        variants = [runs.variant(common, case, folder, settings, 3500) for case in wanted]
        print(f"{given.model}, {given.dtype}, {given.threads} threads, rows of at most {length} tokens; {prepared['workload']}")
        outcomes = measure(SCRIPT, variants, repetitions=given.repetitions, threads=given.threads)
    found = runs.summary(outcomes, "all")
    print(f"\n{runs.cases_table(found, 'all', plans=True)}\n")
    facts = {"settings": {"model": given.model, "dtype": given.dtype, "threads": given.threads, "max_length": length, "batch": chats.BATCH}}
    facts |= {"workload": prepared["workload"], "summary": found, "all": {n: o.facts() for n, o in outcomes.items()}}
    what = "one training step of train_chat's with each lever off and on: medians of interleaved repetitions, fresh processes"
    print(f"written to {write('levers', what, facts, packages=train_chat.PACKAGES[:3], output=given.output)}")
    return 1 if any(o.error for o in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
