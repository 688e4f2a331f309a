"""Does every method learn? Encoder methods on MiniLM and SST-2, generative ones on SmolLM2 and restaurant descriptions (E2E).

    python benchmarks/learning.py --encoder DIR [--data DIR] [--only lora,dora] [--jobs 2] [--again] [--page]

Encoder: all-MiniLM-L6-v2 (DIR: its files), 2,000 rows of SST-2 drawn by the seed, three seeds, accuracy on the 872 validation rows after
the last epoch. Every method trains the same head beside its own tensors: BERT's pooler and the classifier on it. The pooler is part of
the head here because this model was trained on the mean of its tokens and never through its pooler, whose outputs differ from row to row by
0.035 only: a fresh classifier alone, at the learning rate of an adapter, hardly moves the logits.

The bar is the frozen-trunk linear probe: logistic regression, L2 strength the best of five on the validation rows (which favours the
probe), on the pooled first token. Beside it stand the probes on the first token itself and on the mean of all tokens, and "head alone": the
same head trained by the same code on the frozen trunk. A method passes where its mean is above the bar's by more than twice the spread, the
larger of the method's and the bar's sample deviations over the seeds.

Generative: SmolLM2-135M-Instruct (built in), one epoch of 64 rows, loss on 24 held-out rows with meanings of their own, one seed.

Each run is a fresh process with one thread that goes through ``byway.train``: CPU seconds of loading, training and evaluating, so that a
busy machine disturbs little; memory is its highest resident size (VmHWM), base and tokenizer included. Finished runs are kept in the
results file and not run again; ``--again`` forgets them. What was found is written to docs/learning.md (``--page``: only that).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from learning_page import page
from machine import machine, memory_mb, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learning.json"
PAGE = HERE.parent / "docs" / "learning.md"
HEAD = ("pooler", "classifier")
TEXT = "this is about whether the movie was good or bad"
SEEDS = (0, 1, 2)
ROWS = 2_000
PHRASES, HELD_OUT = 64, 24

SLOW = {"epochs": 4, "rows_per_step": 32, "weight_decay": 1.0}
"""For prompts and the ladder, beside which the head would otherwise have learned its rows by heart before they have moved."""
ENCODER: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "dora": {"learning_rate": 2e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "adalora": {"learning_rate": 5e-3, "method": {"targets": "all-linear"}},
    "prompt_tuning": SLOW | {"learning_rate": 1e-2, "method": {"num_virtual_tokens": 10, "init": "text", "text": TEXT}},
    "p_tuning": SLOW | {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 20, "encoder": "mlp"}},
    "prefix_tuning": {"learning_rate": 5e-4, "method": {"num_virtual_tokens": 10}},
    "p_tuning_v2": SLOW | {"learning_rate": 1e-2, "method": {"num_virtual_tokens": 10, "init": "random"}},
    "bottleneck_adapter": {"learning_rate": 2e-3, "method": {}},
    "parallel_adapter": {"learning_rate": 2e-3, "method": {"reduction": 8}},
    "ladder_side_tuning": SLOW | {"learning_rate": 3e-3, "method": {"reduction": 4}},
    "ia3": {"learning_rate": 1e-2, "method": {}},
    "bitfit": {"learning_rate": 4e-3, "method": {}},
    "layer_norm": {"learning_rate": 4e-3, "method": {}},
    "full": {"learning_rate": 1e-4, "method": {"layers": "0-"}},
    "head alone": {"learning_rate": 3e-3, "method": {"name": "full", "targets": ["pooler.dense"], "modules_to_save": ["classifier"]}},
}
"""Method → learning rate, epochs (1) and fields on the encoder. An MLP or LSTM that makes virtual tokens has a low rate, for a step in it
moves all of them; tokens and keys that are trained themselves have twice the epochs; ``full`` trains the layers, not the embeddings."""
GENERATIVE: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 1e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "dora": {"learning_rate": 1e-3, "method": {"rank": 8, "targets": "all-linear"}},
    "adalora": {"learning_rate": 3e-3, "method": {"targets": "all-linear"}},
    "prompt_tuning": {"learning_rate": 3e-2, "method": {"num_virtual_tokens": 10}},
    "p_tuning": {"learning_rate": 2e-3, "method": {"num_virtual_tokens": 10}},
    "prefix_tuning": {"learning_rate": 5e-4, "method": {"num_virtual_tokens": 10}},
    "p_tuning_v2": {"learning_rate": 5e-3, "method": {"num_virtual_tokens": 10, "init": "random"}},
    "bottleneck_adapter": {"learning_rate": 1e-3, "method": {}},
    "parallel_adapter": {"learning_rate": 1e-3, "method": {"reduction": 16}},
    "ladder_side_tuning": {"learning_rate": 3e-3, "method": {"reduction": 4, "mix_output": True}},
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
    pairs = random.Random(0).sample(sorted(by_meaning.items()), PHRASES + HELD_OUT)
    rows = [{"prompt": f"{meaning}\n", "completion": text} for meaning, text in pairs]
    return rows[:PHRASES], rows[PHRASES:]


def recipe_of(kind: str, method: str, seed: int, data: Path, encoder: str, folder: Path) -> dict[str, Any]:
    """The recipe of one run; everything in it but the method, its learning rate and its epochs is the same for all methods."""
    settings = (ENCODER if kind == "encoder" else GENERATIVE)[method]
    train, held_out = encoder_rows(data, seed) if kind == "encoder" else generative_rows(data)
    rows = {"train": write_rows(folder / "train.jsonl", train), "eval": write_rows(folder / "eval.jsonl", held_out)}
    steps = {
        "epochs": settings.get("epochs", 1),
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings.get("weight_decay", 0.0),
        "warmup_ratio": 0.06,
        "seed": seed,
        "eval_every": 1_000_000,  # after the last step
    }
    if kind == "encoder":
        base = {"model": encoder, "dtype": "fp32"}
        chosen = {"name": method, "modules_to_save": list(HEAD)} | settings["method"]
        rows |= {"task": "classification", "labels": ["negative", "positive"], "max_length": 64}
        steps |= {"rows_per_step": settings.get("rows_per_step", 8), "micro_batch_tokens": 128}
    else:
        base = {"model": "smollm2-135m-instruct", "dtype": "fp32"}
        chosen = {"name": method} | settings["method"]
        rows |= {"task": "text", "max_length": 128}
        steps |= {"rows_per_step": 4, "micro_batch_tokens": 512}
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
        head = sum(p.numel() for n, p in adapter.named_parameters() if ".copy." in n and any(part in n for part in HEAD))
    return {
        "kind": kind,
        "method": method,
        "seed": seed,
        "trained": trained - head,
        "head": head,
        "score": last["accuracy"] if kind == "encoder" else last["loss"],
        "cpu_seconds": seconds,
        "memory_mb": memory_mb("VmHWM"),
        "recipe": {"method": recipe["method"], "train": recipe["train"]},
    }


def probe(data: Path, encoder: str) -> dict[str, list[float]]:
    """Accuracy of logistic regression for each seed on the frozen pooled first token, the first token, and the mean of all tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    @torch.no_grad()
    def features(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"pooled": [], "first": [], "mean": [], "label": []}
        ordered = sorted(rows, key=lambda row: len(row["sentence"]))  # little padding
        for part in (ordered[start : start + 32] for start in range(0, len(ordered), 32)):
            texts = [row["sentence"] for row in part]
            batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
            out, mask = model(**batch), batch["attention_mask"][..., None]
            found["pooled"].append(out.pooler_output)
            found["first"].append(out.last_hidden_state[:, 0])
            found["mean"].append((out.last_hidden_state * mask).sum(1) / mask.sum(1))
            found["label"].append(torch.tensor([float(row["label"]) for row in part]))
        return {name: torch.cat(parts) for name, parts in found.items()}

    found: dict[str, list[float]] = {"pooled": [], "first": [], "mean": []}
    there = features(encoder_rows(data, 0)[1])
    for seed in SEEDS:
        here = features(encoder_rows(data, seed)[0])
        for name, scores in found.items():
            known = (here[name], here["label"], there[name], there["label"])
            scores.append(max(logistic(*known, c) for c in (1e-3, 1e-2, 0.1, 1.0, 10.0)))
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
    from byway.recipe.recipe import Recipe
    from byway.tasks import load

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.from_dict(recipe_of("generative", "lora", 0, data, "", Path(folder)))
        model, tokenizer = byway.load_base(recipe.base.model, "fp32")
        task = load(recipe.data.task)(recipe.data, seed=0)
        table = model.get_input_embeddings()
        assert isinstance(table, torch.nn.Embedding)
        rows = task.encode(tokenizer, table.num_embeddings)
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default=os.environ.get("BYWAY_MINILM", ""), help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", HERE.parent.parent / "shared" / "data")))
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--page", action="store_true", help="write the page from the results, run nothing")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "METHOD", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--bars", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(todo: Sequence[tuple[str, str, int]], results: dict[str, Any], shared: Sequence[str], jobs: int) -> list[str]:
    """Run these, each in a process of its own; the file is written after each. What went wrong, the others having run."""
    failed: list[str] = []

    def work(run: tuple[str, str, int]) -> None:
        kind, method, seed = run
        load = os.getloadavg()[0]
        try:
            found = child([*shared, "--one", kind, method, str(seed)]) | {"load_of_machine": load}
        except RuntimeError as error:
            failed.append(str(error))
            return
        results["runs"][key(run)] = found
        print(f"{kind} {method} seed {seed}: {found['score']:.3f}  {found['cpu_seconds']:.0f} s  {found['memory_mb']:.0f} MB", flush=True)
        keep(results)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))
    return failed


def key(run: tuple[str, str, int]) -> str:
    """The name of a run in the results."""
    kind, method, seed = run
    return f"{kind}-{method}-{seed}"


def keep(results: Mapping[str, Any]) -> None:
    """Write the results file."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, write results and page, show the page."""
    given = arguments()
    results: dict[str, Any] = {} if given.again or not RESULTS.is_file() else json.loads(RESULTS.read_text(encoding="utf-8"))
    if given.page:
        shown = page(results, tuple(ENCODER), tuple(GENERATIVE))
        PAGE.write_text(shown, encoding="utf-8")
        return
    if not (Path(given.encoder) / "config.json").is_file():
        raise SystemExit("--encoder: the directory of all-MiniLM-L6-v2 (config.json, model.safetensors, tokenizer.json)")
    if given.one:
        kind, method, seed = given.one
        print(json.dumps(one(kind, method, int(seed), given.data, given.encoder)))
        return
    if given.bars:
        print(json.dumps({"probe": probe(given.data, given.encoder), "base_loss": base_loss(given.data)}))
        return
    shared = ["--encoder", given.encoder, "--data", str(given.data)]
    if "probe" not in results:
        results |= {"machine": machine(), "versions": versions(("byway", "torch", "transformers")), "runs": {}} | child([*shared, "--bars"])
        keep(results)
    only = [name for name in given.only.split(",") if name]
    unknown = [name for name in only if name not in ENCODER and name not in GENERATIVE]
    if unknown:
        raise SystemExit(f"--only: there is no {unknown[0]!r}; there are: {', '.join(ENCODER)}")
    failed = measure([run for run in wanted(only) if key(run) not in results["runs"]], results, shared, given.jobs)
    shown = page(results, tuple(ENCODER), tuple(GENERATIVE))
    PAGE.write_text(shown, encoding="utf-8")
    print("\n" + shown)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
