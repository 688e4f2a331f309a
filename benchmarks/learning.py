"""Does every method learn? Encoder methods on MiniLM and SST-2, generative ones on SmolLM2 and restaurant descriptions (E2E).

    python benchmarks/learning.py --encoder DIR [--data DIR] [--only lora,dora] [--jobs 2] [--again]

Encoder: all-MiniLM-L6-v2 (DIR: its files), 2,000 rows of SST-2 drawn by the seed, three seeds, accuracy on 872 validation rows after the
last epoch. The bar is the frozen-trunk linear probe: logistic regression, L2 strength the best of five on the validation rows (which
favours the probe), on what the classifier reads (the pooled first token); the probe on the mean of all tokens stands beside it.
Generative: SmolLM2-135M-Instruct (built in), 160 rows, loss on 60 held-out rows whose meanings are in no training row, one seed.

Each run is a fresh process with one thread that goes through ``byway.train``: CPU seconds of loading, training and evaluating, so that a
busy machine disturbs little; memory is its highest resident size (VmHWM), base and tokenizer included.
Finished runs are kept in the results file and not run again; ``--again`` forgets them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from startup import machine, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning.json"
SEEDS = (0, 1, 2)
ROWS, EPOCHS = 2_000, 2
PHRASE = 160

ENCODER: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "dora": {"learning_rate": 2e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "adalora": {"learning_rate": 5e-3, "method": {"targets": "all-linear"}},
    "prompt_tuning": {"learning_rate": 3e-2, "method": {"num_virtual_tokens": 10}},
    "p_tuning": {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 10}},
    "prefix_tuning": {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 10}},
    "p_tuning_v2": {"learning_rate": 1e-2, "method": {"num_virtual_tokens": 10}},
    "bottleneck_adapter": {"learning_rate": 2e-3, "method": {}},
    "parallel_adapter": {"learning_rate": 2e-3, "method": {"reduction": 8}},
    "ladder_side_tuning": {"learning_rate": 3e-3, "method": {"reduction": 4}},
    "ia3": {"learning_rate": 1e-2, "method": {}},
    "bitfit": {"learning_rate": 4e-3, "method": {}},
    "layer_norm": {"learning_rate": 4e-3, "method": {}},
    "full": {"learning_rate": 1e-4, "method": {}},
}
"""Method → learning rate and fields on the encoder; the rates are those usual for each, not searched."""
GENERATIVE: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 1e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "dora": {"learning_rate": 1e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "adalora": {"learning_rate": 3e-3, "method": {"targets": "all-linear"}},
    "prompt_tuning": {"learning_rate": 3e-2, "method": {"num_virtual_tokens": 10}},
    "p_tuning": {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 10}},
    "prefix_tuning": {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 10}},
    "p_tuning_v2": {"learning_rate": 1e-2, "method": {"num_virtual_tokens": 10}},
    "bottleneck_adapter": {"learning_rate": 1e-3, "method": {}},
    "parallel_adapter": {"learning_rate": 1e-3, "method": {"reduction": 16}},
    "ladder_side_tuning": {"learning_rate": 3e-3, "method": {"reduction": 4}},
    "ia3": {"learning_rate": 1e-2, "method": {}},
    "bitfit": {"learning_rate": 4e-3, "method": {}},
    "layer_norm": {"learning_rate": 4e-3, "method": {}},
    "full": {"learning_rate": 5e-5, "method": {"layers": "28-"}},
}
"""The same on the language model; ``full`` trains its last two layers."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON-lines file; returns its path for a recipe."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def encoder_rows(data: Path, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """2,000 training rows drawn by `seed`, and the validation rows."""
    folder = data / "glue-sst2"
    return random.Random(seed).sample(rows_of(folder / "train.jsonl"), ROWS), rows_of(folder / "validation.jsonl")


def generative_rows(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Completions: a table of facts → a sentence; one row for each meaning, so that none is in both parts."""
    by_meaning = {row["meaning_representation"]: row["human_reference"] for row in rows_of(data / "e2e-nlg" / "train.jsonl")}
    pairs = random.Random(0).sample(sorted(by_meaning.items()), PHRASE + 60)
    rows = [{"prompt": f"{meaning}\n", "completion": text} for meaning, text in pairs]
    return rows[:PHRASE], rows[PHRASE:]


def recipe_of(kind: str, method: str, seed: int, data: Path, encoder: str, folder: Path) -> dict[str, Any]:
    """The recipe of one run; everything in it but the method and its learning rate is the same for all methods."""
    settings = (ENCODER if kind == "encoder" else GENERATIVE)[method]
    train, held_out = encoder_rows(data, seed) if kind == "encoder" else generative_rows(data)
    rows = {"train": write_rows(folder / "train.jsonl", train), "eval": write_rows(folder / "eval.jsonl", held_out)}
    base = {"model": encoder if kind == "encoder" else "smollm2-135m-instruct", "dtype": "fp32"}
    chosen = {"name": method, **settings["method"]}
    common = {
        "learning_rate": settings["learning_rate"],
        "warmup_ratio": 0.06,
        "seed": seed,
        "eval_every": 1_000_000,
    }  # after the last step
    if kind == "encoder":
        rows |= {"task": "classification", "labels": ["negative", "positive"], "max_length": 64}
        steps = {"epochs": EPOCHS, "rows_per_step": 16, **common}
    else:
        rows |= {"task": "text", "max_length": 128}
        steps = {"epochs": 1, "rows_per_step": 8, **common}
    return {"base": base, "method": chosen, "data": rows, "train": steps, "output": str(folder / "run")}


def one(kind: str, method: str, seed: int, data: Path, encoder: str) -> dict[str, Any]:
    """Train once, here; what it gave."""
    import torch

    import byway

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(kind, method, seed, data, encoder, Path(folder))
        began = time.process_time()
        run = byway.train(recipe)
        seconds = time.process_time() - began
        rows = rows_of(Path(folder) / "run" / "metrics.jsonl")
        last = [row for row in rows if row.get("eval")][-1]
        adapter = run.adapter
        assert not isinstance(adapter, tuple)
        trained = adapter.num_parameters
        head = sum(p.numel() for n, p in adapter.named_parameters() if ".copy." in n and "classifier" in n)
    return {
        "kind": kind,
        "method": method,
        "seed": seed,
        "trained": trained - head,
        "head": head,
        "score": last["accuracy"] if kind == "encoder" else last["loss"],
        "cpu_seconds": seconds,
        "memory_mb": peak_mb(),
        "recipe": {"method": recipe["method"], "train": recipe["train"]},
    }


def peak_mb() -> float:
    """The highest resident size of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def probe(data: Path, encoder: str) -> dict[str, list[float]]:
    """Accuracy of logistic regression on frozen features, for each seed: on the pooled first token, and on the mean of all tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    @torch.no_grad()
    def features(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pooled, means = [], []
        for start in range(0, len(rows), 32):
            texts = [row["sentence"] for row in rows[start : start + 32]]
            batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
            out, mask = model(**batch), batch["attention_mask"][..., None]
            pooled.append(out.pooler_output)
            means.append((out.last_hidden_state * mask).sum(1) / mask.sum(1))
        return {"pooled": torch.cat(pooled), "mean": torch.cat(means)}

    def labels(rows: Sequence[Mapping[str, Any]]) -> Any:
        return torch.tensor([float(row["label"]) for row in rows])

    found: dict[str, list[float]] = {"pooled": [], "mean": []}
    _, held_out = encoder_rows(data, 0)
    there = features(held_out)
    for seed in SEEDS:
        train, _ = encoder_rows(data, seed)
        here = features(train)
        for kind, scores in found.items():
            scores.append(max(logistic(here[kind], labels(train), there[kind], labels(held_out), c) for c in (1e-3, 1e-2, 0.1, 1.0, 10.0)))
    return found


def logistic(x: Any, y: Any, x_test: Any, y_test: Any, strength: float) -> float:
    """Test accuracy of L2-regularized logistic regression on standardized features, fitted to convergence."""
    import torch

    mean, deviation = x.mean(0), x.std(0)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], y, reduction="sum")
        (loss + weights[:-1].pow(2).sum() / (2 * strength)).backward()
        return loss

    optimizer.step(closure)
    right = ((x_test @ weights[:-1] + weights[-1]) > 0) == (y_test > 0)
    return float(right.float().mean())


def base_loss(data: Path) -> float:
    """Loss of the bare language model on the held-out rows, by the same task code."""
    import torch

    import byway
    from byway.recipe import Recipe
    from byway.tasks import load

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.from_dict(recipe_of("generative", "lora", 0, data, "", Path(folder)))
        model, tokenizer = byway.load_base(recipe.base.model, "fp32")
        task = load(recipe.data.task)(recipe.data, seed=0)
        rows = task.encode(tokenizer, model.get_input_embeddings().num_embeddings)
        with torch.no_grad():
            return float(task.evaluate(model, rows.evaluation)["loss"])


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """This script in a fresh process with one thread; the JSON of its last line. RuntimeError with the end of what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def wanted(only: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(kind, method, seed) of every run: the first seed of everything first, so that a run that is cut says something of each."""
    for kind, methods, seeds in (("encoder", ENCODER, SEEDS[:1]), ("generative", GENERATIVE, SEEDS[:1]), ("encoder", ENCODER, SEEDS[1:])):
        yield from ((kind, method, seed) for seed in seeds for method in methods if not only or method in only)


def table(results: Mapping[str, Any]) -> str:
    """What was found, as markdown."""
    bar = results["probe"]
    lines = [
        f"linear probe on the frozen trunk: {_spread(bar['pooled'])} (on the mean of all tokens {_spread(bar['mean'])})",
        "",
        "| encoder method | trained, without head | accuracy, mean of 3 seeds ± spread | above the probe | CPU s | MB |",
        "|---|---|---|---|---|---|",
    ]
    runs = results["runs"].values()
    for method in ENCODER:
        own = [run for run in runs if (run["kind"], run["method"]) == ("encoder", method)]
        if own:
            scores = [run["score"] for run in own]
            above = statistics.mean(scores) - statistics.mean(bar["pooled"])
            middle = {key: statistics.median(run[key] for run in own) for key in ("cpu_seconds", "memory_mb")}
            lines.append(
                f"| {method} | {own[0]['trained']:,} | {_spread(scores)} | {above:+.3f} | {middle['cpu_seconds']:.0f} | "
                f"{middle['memory_mb']:.0f} |"
            )
    lines += [
        "",
        f"held-out loss of the bare language model: {results['base_loss']:.3f}",
        "",
        "| generative method | trained | held-out loss | CPU s | MB |",
        "|---|---|---|---|---|",
    ]
    for method in GENERATIVE:
        for run in (run for run in runs if (run["kind"], run["method"]) == ("generative", method)):
            lines.append(f"| {method} | {run['trained']:,} | {run['score']:.3f} | {run['cpu_seconds']:.0f} | {run['memory_mb']:.0f} |")
    return "\n".join(lines)


def _spread(scores: Sequence[float]) -> str:
    return f"{statistics.mean(scores):.3f} ± {(max(scores) - min(scores)) / 2:.3f}"


def main() -> None:
    """Run what is missing, show the table, write the file after each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default=os.environ.get("BYWAY_MINILM", ""), help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", HERE.parent.parent / "shared" / "data")))
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "METHOD", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--bars", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (Path(given.encoder) / "config.json").is_file():
        raise SystemExit("--encoder: the directory of all-MiniLM-L6-v2 (config.json, model.safetensors, tokenizer.json)")
    if given.one:
        kind, method, seed = given.one
        print(json.dumps(one(kind, method, int(seed), given.data, given.encoder)))
        return
    if given.bars:
        print(json.dumps({"probe": probe(given.data, given.encoder), "base_loss": base_loss(given.data)}))
        return
    results: dict[str, Any] = {} if given.again or not RESULTS.is_file() else json.loads(RESULTS.read_text(encoding="utf-8"))
    shared = ["--encoder", given.encoder, "--data", str(given.data)]
    if "probe" not in results:
        results |= {"machine": machine(), "versions": versions(), "runs": {}} | child([*shared, "--bars"])
    only = [name for name in given.only.split(",") if name]
    todo = [run for run in wanted(only) if "-".join(map(str, run)) not in results["runs"]]

    failed: list[str] = []

    def work(run: tuple[str, str, int]) -> None:
        kind, method, seed = run
        load = os.getloadavg()[0]
        try:
            found = child([*shared, "--one", kind, method, str(seed)]) | {"load_of_machine": load}
        except RuntimeError as error:  # the others still run; the exit code and the end of the output say it
            failed.append(str(error))
            return
        results["runs"][f"{kind}-{method}-{seed}"] = found
        print(f"{kind} {method} seed {seed}: {found['score']:.3f}  {found['cpu_seconds']:.0f} s  {found['memory_mb']:.0f} MB", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(work, todo))
    print("\n" + table(results))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
