"""Does a base multiplied in 8 bits (`base.compute: int8`) learn what it learns otherwise? Loss curves side by side; nothing about time.

    python benchmarks/int8_quality.py [--steps 30] [--seeds 3] [--models stories260k,smollm2] [--dtypes fp32,bf16] [--only curves]

Curves: SmolLM2-135M-Instruct (built in) and stories260k (a trained Llama of 260,000 numbers) learn Shakespeare, LoRA rank 8 on all linear
maps, kept in float32 and in bfloat16, with their own products and with 8-bit ones: the same rows in the same order from the same start, for
each seed. Beside the difference that the products make stands the spread that another seed makes.

Probe: SmolLM2-135M-Instruct, LoRA rank 16 with random factors, 72 tokens of Shakespeare: how far loss and gradients are off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "int8_quality.json"
ROWS, HELD_OUT, ROW = 400, 40, 240
"""Rows to learn from and to measure on, and characters of each."""
MODELS = {"stories260k": 5e-3, "smollm2": 1e-3}
"""What learns, and its learning rate."""
LAST = 10
"""So many steps are averaged at the end of a curve."""


def rows_of(data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pieces of the plays: the last ones are held out."""
    text = (data / "tiny-shakespeare" / "input.txt").read_text(encoding="utf-8")
    pieces = [{"text": text[start : start + ROW]} for start in range(0, ROW * (ROWS + HELD_OUT), ROW)]
    return pieces[:ROWS], pieces[ROWS:]


def curve(data: Path, folder: Path, *, model: str, dtype: str, compute: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the loss of each step, the loss on what was held out, and what the plan says about the products."""
    import byway
    from byway.train.reporting.events import Event, Planned

    train, held_out = rows_of(data)
    paths = {}
    for name, rows in (("train", train), ("eval", held_out)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said: list[str] = []
    base = "smollm2-135m-instruct" if model == "smollm2" else str(data / model / "hf")

    def note(event: Event) -> None:
        if isinstance(event, Planned):
            said.append(event.plan.levers.partition("int8 products: ")[2])

    run = byway.train(
        {
            "base": {"model": base, "dtype": dtype, "compute": compute, "device": "cpu"},
            "method": {"name": "lora", "rank": 8, "targets": "all-linear"},
            "data": {"train": str(paths["train"]), "eval": str(paths["eval"]), "task": "text", "max_length": 256},
            "train": {
                "max_steps": steps,
                "learning_rate": MODELS[model],
                "rows_per_step": 4,
                "seed": seed,
                "threads": 1,
                "eval_every": steps,
            },
            "output": str(folder / f"{model}-{dtype}-{compute}-{seed}"),
        },
        on_event=note,
    )
    logged = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "model": model,
        "dtype": dtype,
        "compute": compute,
        "seed": seed,
        "losses": [round(row["loss"], 5) for row in logged if not row.get("eval")],
        "held_out": round(run.metrics["eval_loss"], 5),
        "said": said[0],
    }


def probe(data: Path) -> dict[str, Any]:
    """The error of one forward and backward pass of SmolLM2, float32."""
    import torch

    import byway
    from byway.base.arithmetic.int8 import measure

    model, tokenizer = byway.load_base("smollm2-135m-instruct", "fp32", compute="int8", device_map="cpu")
    assert tokenizer is not None
    adapter = byway.attach(model, byway.LoRA(rank=16, targets="all-linear"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:  # which starts at zero, and would leave A without a gradient
                parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=draw))
    ids = tokenizer(rows_of(data)[1][0]["text"] * 2, return_tensors="pt")["input_ids"][:, :72]
    began = time.process_time()
    error = measure(model, {"input_ids": ids}, _loss)
    found = {"tokens": ids.shape[1], "plain_loss": error.plain, "loss_off": error.loss, "gradients_off": error.gradients}
    return found | {"cpu_seconds": time.process_time() - began}


def _loss(model: Any, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Any, int]:
    import torch

    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), ids.shape[1] - 1


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each model and dtype: the ends of the curves and the held-out losses of both products, and the spread over the seeds."""
    found = []
    for kind in dict.fromkeys((run["model"], run["dtype"]) for run in runs):
        both = [run for run in runs if (run["model"], run["dtype"]) == kind]
        own, plain = ([run for run in both if (run["compute"] == "int8") == wanted] for wanted in (True, False))
        ends = [[statistics.fmean(run["losses"][-LAST:]) for run in each] for each in (own, plain)]
        held = [[run["held_out"] for run in each] for each in (own, plain)]
        steps = [a - b for x, y in zip(own, plain, strict=True) for a, b in zip(x["losses"], y["losses"], strict=True)]
        found.append(
            {
                "model": kind[0],
                "dtype": kind[1],
                "first_loss": statistics.fmean(run["losses"][0] for run in plain),
                "end_int8": statistics.fmean(ends[0]),
                "end_plain": statistics.fmean(ends[1]),
                "held_out_int8": statistics.fmean(held[0]),
                "held_out_plain": statistics.fmean(held[1]),
                "held_out_differences": [round(a - b, 5) for a, b in zip(*held, strict=True)],
                "held_out_spread_over_seeds": statistics.stdev(held[1]) if len(held[1]) > 1 else None,
                "largest_difference_of_a_step": max(map(abs, steps)),
                "mean_difference_of_a_step": statistics.fmean(steps),
            }
        )
    return found


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", HERE.parent.parent / "shared" / "data")))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="fp32,bf16", help="how the base of the curves is kept; bf16 takes long where it is emulated")
    parser.add_argument("--only", choices=("curves", "probe"), help="one of the two; what the other one gave before stays in the file")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "versions": versions(("byway", "torch", "transformers"))}
    if given.only != "probe":
        runs: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            kinds = itertools.product(given.models.split(","), given.dtypes.split(","), range(given.seeds), ("same", "int8"))
            for model, dtype, seed, compute in kinds:
                runs.append(curve(given.data, Path(folder), model=model, dtype=dtype, compute=compute, seed=seed, steps=given.steps))
                ends = f"{runs[-1]['losses'][0]:.3f} → {runs[-1]['losses'][-1]:.3f}"
                print(f"{model} {dtype} {compute} seed {seed}: {ends}, held out {runs[-1]['held_out']:.4f}", flush=True)
        keep(found | {"summary": summary(runs), "runs": runs})
        print(json.dumps(summary(runs), indent=1), flush=True)
    if given.only != "curves":
        keep(found | {"probe": probe(given.data)})
        print(RESULTS.read_text(encoding="utf-8").partition('"probe"')[2])


def keep(found: Mapping[str, Any]) -> None:
    """Write what was found; what the other part found before stays."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(before | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
