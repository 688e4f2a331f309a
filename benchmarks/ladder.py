"""Peak memory of one training step: Ladder Side-Tuning beside LoRA and full fine-tuning, same model, same batch.

    python benchmarks/ladder.py [--rows 4] [--length 192]

Random models of about 40 million parameters (a BERT with a classifier, a Llama with its head), AdamW, two steps. Each variant runs in a
fresh process whose peak is the kernel's own high-water mark (VmHWM); beside it what the process held before the first step, so that their
difference is what training costs, and the bytes that autograd kept for the backward pass. The table goes to the screen, everything with
the machine and the versions to benchmarks/results/ladder.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "ladder.json"
MODELS = ("bert", "llama")
VARIANTS = ("ladder", "lora", "full")
PACKAGES = ("byway", "torch", "transformers")


def memory(field: str) -> float:
    """A field of this process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def build(name: str) -> Any:
    """A random model: 12 layers of width 512."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 4000}
    if name == "bert":
        return BertForSequenceClassification(BertConfig(intermediate_size=2048, **sizes))
    return LlamaForCausalLM(LlamaConfig(intermediate_size=1408, num_key_value_heads=4, tie_word_embeddings=True, **sizes))


def prepare(name: str, variant: str) -> tuple[Any, list[Any]]:
    """(model, what is trained)."""
    import byway

    model = build(name)
    if variant == "full":
        return model, list(model.parameters())
    method = byway.LadderSideTuning(reduction=8) if variant == "ladder" else byway.LoRA(rank=16, targets="all-linear")
    return model, [p for _, p in byway.attach(model, method).named_parameters()]


def step(name: str, variant: str, rows: int, length: int) -> dict[str, float]:
    """Two training steps in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, trained = prepare(name, variant)
    model.train()
    ids = torch.randint(5, 4000, (rows, length))
    labels = ids if name == "llama" else torch.zeros(rows, dtype=torch.long)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    before, kept, began = memory("VmRSS"), {}, time.process_time()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = memory("VmHWM")
    return {
        "parameters": sum(p.numel() for p in trained),
        "peak_mb": round(peak),
        "before_mb": round(before),
        "training_mb": round(peak - before),
        "kept_for_backward_mb": round(sum(kept.values()) / 2**20),
        "seconds": round(time.process_time() - began, 1),
    }


def fresh(name: str, variant: str, rows: int, length: int) -> dict[str, float]:
    """:func:`step` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, variant, "--rows", str(rows), "--length", str(length)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.one:
        name, variant = given.one
        print(json.dumps(step(name, variant, given.rows, given.length)))
        return 0
    found = {name: {variant: fresh(name, variant, given.rows, given.length) for variant in VARIANTS} for name in MODELS}
    result = {
        "what": "one training step, float32, AdamW: peak resident memory of a fresh process (VmHWM), MB",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "batch": {"rows": given.rows, "length": given.length},
        "results": found,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = given.output.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(given.output)
    print(f"{'':14}  trained      peak   before   for training   kept for backward   CPU s")
    for name, variants in found.items():
        for variant, r in variants.items():
            print(
                f"{name + ' ' + variant:14} {r['parameters']:>11,} {r['peak_mb']:>6} MB {r['before_mb']:>5} MB {r['training_mb']:>11} MB "
                f"{r['kept_for_backward_mb']:>16} MB {r['seconds']:>7}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
