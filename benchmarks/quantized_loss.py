"""Does LoRA on a quantized base with biases learn what peft's does? SmolLM2 reshaped as a Qwen2 (its biases are zero), step by step.

    python benchmarks/quantized_loss.py [--quantize nf4] [--steps 12] [--data DIR]

LoRA, rank 16 on all linear maps, AdamW. Both start from the same A (B is zero), see the same rows and use a plain loop: what differs is
the adapter. The biases matter: a quantized map with a bias returns a view made by a custom autograd function, into which nothing may be
written. One process, one thread; nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import table, write
from learning import generative_rows

RANK, ALPHA, RATE, BATCH, LENGTH = 16, 32, 2e-4, 4, 96


def reshaped(directory: Path) -> Any:
    """Write the built-in base as a Qwen2 to `directory`: the same model, with zero biases. Return its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import byway

    model, tokenizer = byway.load_base("smollm2-135m-instruct", dtype="fp32")
    config = model.config.to_dict()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    further = ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    twin = Qwen2ForCausalLM(Qwen2Config(**{key: config[key] for key in (*same, *further)})).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("bias") for name in missing)
    with torch.no_grad():
        for name in missing:
            twin.get_parameter(name).zero_()
        ids = torch.arange(100, 120)[None]
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-3)
    twin.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def batches(tokenizer: Any, data: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Yield `steps` batches of E2E's rows, all tokens learned."""
    rows, _ = generative_rows(data)
    tokenizer.padding_side = "right"
    for step in range(steps):
        texts = [row["prompt"] + row["completion"] for row in (rows[(step * BATCH + i) % len(rows)] for i in range(BATCH))]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def losses(model: Any, parameters: Sequence[Any], given: Sequence[dict[str, Any]]) -> list[float]:
    """Train by a plain loop; return the loss of each step."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    found = []
    model.train()
    for batch in given:
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def both(directory: Path, quantize: str, given: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Train Byway's LoRA and peft's on the base in `directory`."""
    import peft
    import torch
    from torch import nn

    import byway

    model, _ = byway.load_base(directory, dtype="fp32", quantize=quantize)
    maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=maps, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(model, config)
    start = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora_A" in name}
    found = {"peft": losses(theirs, [p for p in theirs.parameters() if p.requires_grad], given)}
    del theirs
    model, _ = byway.load_base(directory, dtype="fp32", quantize=quantize)
    adapter = byway.attach(model, byway.LoRA(rank=RANK, alpha=ALPHA, targets=maps))
    with torch.no_grad():
        for site, side in adapter.side_paths():
            side.get_parameter("lora_A").copy_(start[f"base_model.model.{site.path}.lora_A.default.weight"])
    return {"byway": losses(model, [p for _, p in adapter.named_parameters()], given), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", default="nf4", choices=["nf4", "int8"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BYWAY_DATA", Path(__file__).parents[2] / "shared" / "data")))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = reshaped(Path(folder))
        found = both(Path(folder), options.quantize, list(batches(tokenizer, options.data, options.steps)))
    pairs = list(zip(found["byway"], found["peft"], strict=True))
    compared = {
        "largest_difference_of_a_step": max(abs(a - b) for a, b in pairs),
        "mean_of_the_last_four": {name: sum(values[-4:]) / len(values[-4:]) for name, values in found.items()},
    }
    rows = [[str(i), f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}"] for i, (a, b) in enumerate(pairs, 1)]
    print(table(["step", "byway", "peft", "apart"], rows))
    facts = {
        "model": "smollm2-135m-instruct, reshaped as Qwen2",
        "quantize": options.quantize,
        "steps": options.steps,
        "compared": compared,
        "losses": found,
    }
    packages = ("byway", "peft", "torch", "transformers", "bitsandbytes")
    name = "quantized_loss" if options.quantize == "nf4" else f"quantized_loss_{options.quantize}"
    write(name, "the loss of LoRA on a quantized base with biases, beside peft's", facts, packages=packages)


if __name__ == "__main__":
    main()
