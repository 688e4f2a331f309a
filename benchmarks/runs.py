"""What the benchmarks that compare Byway with itself share: a worker that runs a recipe, and one table of it.

A variant is a recipe. A repetition is `steps` optimizer steps; an epoch is as many as it has. Keys that this version of Byway does not have
yet leave their variants out, and that is said.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chats
from harness import Gate, Loop, Outcome, Variant, table

__all__ = ["Case", "add_options", "byway_run", "cases_table", "possible", "recipe", "summary"]


@dataclass(frozen=True)
class Case:
    """One recipe by name; ``sections`` are laid over the common recipe (method: in place of it)."""

    name: str
    sections: Mapping[str, Mapping[str, Any]]


def recipe(common: Mapping[str, Any], case: Case, output: Path) -> dict[str, Any]:
    """The recipe of a case."""
    merged: dict[str, Any] = {key: dict(value) for key, value in common.items()}
    for section, values in case.sections.items():
        merged[section] = dict(values) if section == "method" else merged.get(section, {}) | dict(values)
    return merged | {"output": str(output)}


def possible(common: Mapping[str, Any], cases: Sequence[Case]) -> list[Case]:
    """The cases that this version can run; what is left out is printed with the reason."""
    from byway import ConfigError, Recipe

    found: list[Case] = []
    for case in cases:
        try:
            Recipe.from_dict(recipe(common, case, Path("unused")))
        except ConfigError as error:
            print(f"left out: {case.name} ({error})")
        else:
            found.append(case)
    return found


def byway_run(gate: Gate, settings: Mapping[str, Any]) -> None:
    """``byway.train`` with an observer that counts its steps. ``settings["step_tokens"]``: what each step must hold, where it is known."""
    import byway
    from byway.train.reporting.events import Event, Planned, Stepped

    loop = Loop(gate, warmup=settings["warmup"], steps=settings["steps"])
    expected: Sequence[int] | None = settings.get("step_tokens")
    seconds: list[float] = []
    began = [0.0]

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            plan, began[0] = event.plan, time.perf_counter()
            loop.facts["prepare_cpu_seconds"] = round(time.process_time(), 2)  # imports, loading, proving the levers
            loop.facts |= {"plan": plan.levers, "trained": plan.trained, "predicted_mb": plan.memory_mb, "warmup_seconds": seconds}
        elif isinstance(event, Stepped):
            tokens, step = event.row["tokens"], event.row["step"]
            if expected is not None and tokens != expected[step - 1]:
                raise RuntimeError(f"step {step} has {tokens} tokens, not {expected[step - 1]}: these are not the rows that were meant")
            if step <= settings["warmup"]:
                seconds.append(event.row["seconds"])
                loop.facts["warmup_wall"] = time.perf_counter() - began[0]  # what is built before the first step is in it too
            loop.stepped(event.row["loss"], tokens)

    byway.train(settings["recipe"], overwrite=True, on_event=watch)
    raise RuntimeError("the run was over before the repetitions were")


def variant(common: Mapping[str, Any], case: Case, folder: Path, settings: Mapping[str, Any], expected_mb: int) -> Variant:
    """The case as something to measure."""
    output = folder / "".join(c if c.isalnum() else "-" for c in case.name)
    return Variant(case.name, {"worker": "byway", "recipe": recipe(common, case, output), **settings}, expected_mb)


def summary(outcomes: Mapping[str, Outcome], reference: str) -> dict[str, dict[str, Any]]:
    """Rates, peaks, and ratios against `reference`; what failed has its error."""
    base = outcomes[reference]
    found: dict[str, dict[str, Any]] = {}
    for name, o in outcomes.items():
        if o.error:
            found[name] = {"error": o.error.strip().splitlines()[-1]}
            continue
        found[name] = {
            "seconds": round(o.median("wall"), 4),
            "cpu_seconds": round(o.median("cpu"), 4),
            "tokens_per_second": round(o.rate(), 1),
            "peak_mb": o.peak_mb,
            "training_peak_mb": o.training_peak_mb,
            "foreign": o.median("foreign"),
            "plan": o.ready.get("plan", ""),
            "trained": o.ready.get("trained"),
        }
        if not base.error:
            found[name] |= {"ratio": round(o.ratio(base), 3), "ratio_by_cpu": round(o.ratio(base, by="cpu"), 3)}
            found[name] |= {"memory_ratio": round(base.peak_mb / o.peak_mb, 3)}
    return found


def cases_table(found: Mapping[str, Mapping[str, Any]], reference: str, *, plans: bool = False) -> str:
    """:func:`summary` as a table."""
    rows: list[list[str]] = []
    for name, each in found.items():
        if "error" in each:
            rows.append([name, "failed", *[""] * 7])
            continue
        ratios = [f"{each[key]:.2f}" if key in each else "-" for key in ("ratio", "ratio_by_cpu", "memory_ratio")]
        times = [f"{each['seconds']:.2f}", f"{each['cpu_seconds']:.2f}", f"{each['tokens_per_second']:.0f}"]
        rows.append([name, *times, *ratios, f"{each['peak_mb']:,}", f"{each['foreign']:.0%}"])
    header = ["", "s", "CPU s", "tok/s", f"× {reference}", "× by CPU", "memory ÷", "peak MB", "others' CPU"]
    shown = table(header, rows)
    lines = [f"{name}: {each['plan']}" for name, each in found.items() if each.get("plan")]
    return shown + ("\n\n" + "\n".join(lines) if plans and lines else "")


def add_options(parser: argparse.ArgumentParser, *, threads: int | None = None) -> None:
    """What all of them can be told."""
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=threads or os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", chats.DATA)))
    parser.add_argument("--only", default="", help="variants whose names hold one of these words, separated by commas; the first one stays")
    parser.add_argument("--quick", action="store_true", help="less work in a repetition")
    parser.add_argument("--output", type=Path, default=None, help="the results file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def chosen(cases: Sequence[Case], only: str) -> list[Case]:
    """The first case, and those whose names hold one of the words."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    return [case for number, case in enumerate(cases) if not words or not number or any(word in case.name for word in words)]
