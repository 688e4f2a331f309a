"""An encoder classifier, MiniLM on SST-2: Byway beside peft under transformers' Trainer, epoch by epoch.

    python benchmarks/encoder.py --encoder DIR [--quick] [--only ladder]

DIR: all-MiniLM-L6-v2 (its files). The same rows of SST-2, 32 in a step, AdamW; a repetition is one epoch. Methods that leave the lower
layers alone run them once and keep what comes out; the repetitions are their later epochs. Without the encoder (``--model tiny``) a random
one of two layers shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import floor
import runs
from harness import Gate, Loop, Variant, call, measure, table, write
from runs import Case

SCRIPT = Path(__file__)
BATCH, LENGTH, RANK, RATE, GROUPS = 32, 64, 8, 2e-3, 10
LORA = {"name": "lora", "rank": RANK, "alpha": 2 * RANK, "targets": "all-linear"}


def cases(layers: int, caches: Path) -> list[Case]:
    """LoRA everywhere, and what can keep the trunk's output."""
    top = LORA | {"layers": f"{layers - 1}-"}
    ladder = {"name": "ladder_side_tuning", "reduction": 4}
    head = {"name": "full", "layers": f"{layers - 1}-"}
    return [
        Case("lora, all layers", {"method": LORA, "engine": {"cache": "off"}}),
        Case("lora, all layers, padded", {"method": LORA, "engine": {"cache": "off", "pack": "off"}}),
        Case("lora, top layer, live", {"method": top, "engine": {"cache": "off"}}),
        Case("lora, top layer, cached", {"method": top, "engine": {"cache": str(caches / "top")}}),
        Case("full, top layer, cached", {"method": head, "engine": {"cache": str(caches / "full")}}),
        Case("ladder, live", {"method": ladder, "engine": {"cache": "off"}}),
        Case("ladder, cached", {"method": ladder, "engine": {"cache": str(caches / "ladder")}}),
    ]


# ---------------------------------------------------------------- workers


def prepare(gate: Gate, settings: Mapping[str, Any]) -> None:
    """The rows of an epoch as a file, their lengths, the encoder's shape."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(settings["folder"])
    encoder = Path(settings["encoder"]) if settings["encoder"] else tiny(folder / "encoder")
    path = Path(settings["data"]) / "glue-sst2" / "train.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: give --data DIR")
    lines = path.read_text(encoding="utf-8").splitlines()[: settings["rows"]]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [json.loads(line)["sentence"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]]
    config = AutoConfig.from_pretrained(encoder)
    shape = floor.shape_of(encoder, RANK)
    gate.send("answer", encoder=str(encoder), lengths=lengths, shape=shape.as_json(), layers=config.num_hidden_layers)


def tiny(directory: Path) -> Path:
    """A random BERT of two layers with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz"])}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(
        directory
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=own, **named).save_pretrained(directory)
    return directory


def peft_trainer(gate: Gate, settings: Mapping[str, Any]) -> None:
    """peft's LoRA under transformers' Trainer, as peft's sequence classification example does it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    torch.set_num_threads(int(settings["threads"]))
    tokenizer = AutoTokenizer.from_pretrained(settings["encoder"], local_files_only=True)
    base = AutoModelForSequenceClassification.from_pretrained(settings["encoder"], num_labels=2, local_files_only=True)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear")
    model: Any = get_peft_model(base, config)
    rows = [json.loads(line) for line in Path(settings["train"]).read_text(encoding="utf-8").splitlines()]
    encoded = [tokenizer(row["sentence"], truncation=True, max_length=LENGTH) for row in rows]
    data = Dataset.from_list([{**one, "labels": row["label"]} for one, row in zip(encoded, rows, strict=True)])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loop = Loop(gate, warmup=settings["warmup"], steps=settings["steps"], facts={"trained": trained})
    arguments: dict[str, Any] = {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "num_train_epochs": 10_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }

    class Timed(Trainer):
        """Counts the real tokens of each batch."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.seen = int(inputs["attention_mask"].sum())
            self.last = super().training_step(model, inputs, num_items_in_batch)
            return self.last

    from peers import each_step

    trainer = Timed(model=model, args=TrainingArguments(**arguments), train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.add_callback(each_step(lambda: loop.stepped(float(trainer.last), trainer.seen)))
    trainer.train()


WORKERS = {"prepare": prepare, "byway": runs.byway_run, "peft": peft_trainer, "floor": floor.serve}


# ---------------------------------------------------------------- the run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_options(parser)
    parser.add_argument("--encoder", default=os.environ.get("BYWAY_MINILM", ""), help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--model", choices=("minilm", "tiny"), default="minilm")
    parser.add_argument("--rows", type=int, default=None, help="rows in an epoch (1024; quick: 256)")
    given = parser.parse_args(arguments)
    if given.worker:
        settings = json.loads(given.worker)
        WORKERS[settings["worker"]](Gate(), settings)
        return 0
    if given.model == "minilm" and not (Path(given.encoder) / "config.json").is_file():
        raise SystemExit("--encoder: the directory of all-MiniLM-L6-v2 (config.json, model.safetensors, tokenizer.json), or --model tiny")
    rows = given.rows or (256 if given.quick else 1024)
    steps = -(-rows // BATCH)
    with tempfile.TemporaryDirectory(prefix="byway-benchmark-") as name:
        options: dict[str, Any] = {"encoder": given.encoder if given.model == "minilm" else "", "data": str(given.data), "rows": rows}
        options |= {"folder": name, "threads": given.threads, "warmup": steps, "steps": steps, "dtype": "fp32", "device": "cpu"}
        prepared = call(SCRIPT, {**options, "worker": "prepare"})
        found = run(given, options | prepared | {"train": str(Path(name) / "train.jsonl")}, Path(name))
    facts = {"settings": {"model": given.model, "rows": rows, "batch": BATCH, "rank": RANK, "threads": given.threads}, **found}
    what = "SST-2 with an encoder: one epoch with each method, medians of interleaved repetitions; cached: epochs after the first"
    packages = ("byway", "torch", "transformers", "peft", "accelerate", "datasets")
    print(f"written to {write('encoder', what, facts, packages=packages, output=given.output)}")
    return 0


def run(given: argparse.Namespace, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All variants beside each other; peft's is the reference."""
    shape = floor.Shape.from_json(options["shape"])
    work = floor.Work(tuple(options["lengths"]), 0, passes=options["steps"])
    common: dict[str, Any] = {
        "base": {"model": options["encoder"], "dtype": "fp32", "device": "cpu"},
        "method": LORA,
        "data": {"train": options["train"], "task": "classification", "labels": ["negative", "positive"], "max_length": LENGTH},
        "train": {"epochs": float(given.repetitions * GROUPS + 2), "rows_per_step": BATCH, "learning_rate": RATE, "schedule": "constant"}
        | {"warmup_steps": 0, "threads": given.threads},
    }
    chosen = runs.possible(common, runs.chosen(cases(options["layers"], folder / "cache"), given.only))
    variants = [Variant("peft + Trainer", {**options, "worker": "peft", "folder": str(folder / "peft")}, 1500)]
    variants += [runs.variant(common, case, folder, {"warmup": options["warmup"], "steps": options["steps"]}, 1200) for case in chosen]
    variants.append(Variant("floor", {**options, "worker": "floor", "tokens": min(work.tokens // options["steps"], 2048)}, 600))
    print(f"{given.model}, fp32, {given.threads} threads, {options['rows']} rows and {work.tokens} tokens an epoch")
    outcomes = measure(SCRIPT, variants, repetitions=given.repetitions, threads=given.threads)
    peak = floor.largest(outcomes["floor"].repetitions)
    least = floor.floor_seconds(work, shape, peak, "fp32")
    found = runs.summary({name: o for name, o in outcomes.items() if name != "floor"}, "peft + Trainer")
    for name, each in found.items():
        if "error" not in each:
            each["first_epoch"] = outcomes[name].ready.get("warmup_wall")
            if "all layers" in name:
                each["share_of_floor"] = round(least / each["seconds"], 3)
    print(f"\n{show(found)}\n\nfloor of LoRA on all layers: {least:.2f} s an epoch ({peak['gflops']:.0f} GFLOP/s)")
    return {
        "summary": found,
        "floor": {"seconds": least, "peak": peak, "flop": work.flop(shape)},
        "all": {n: o.facts() for n, o in outcomes.items()},
    }


def show(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table."""
    rows: list[list[str]] = []
    for name, each in found.items():
        if "error" in each:
            rows.append([name, "failed", *[""] * 6])
            continue
        first = "-" if each.get("first_epoch") is None else f"{each['first_epoch']:.2f}"
        share = f"{each['share_of_floor']:.0%}" if "share_of_floor" in each else "-"
        ratios = [f"{each[key]:.2f}" if key in each else "-" for key in ("ratio", "ratio_by_cpu")]
        rows.append([name, first, f"{each['seconds']:.2f}", f"{each['cpu_seconds']:.2f}", *ratios, f"{each['peak_mb']:,}", share])
    return table(["", "epoch 1, s", "later, s", "later, CPU s", "× peft", "× by CPU", "peak MB", "of the floor"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
