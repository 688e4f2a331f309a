"""transformers' Trainer on a model with an adapter: attach, train, save. Nothing of peft is needed.

A text classifier learns to tell questions from orders. The model stays the class it was, so the Trainer notices
nothing; only the adapter and the new head are trained.

    python examples/trainer.py
    python examples/trainer.py --model Qwen/Qwen2.5-0.5B --quantize nf4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import byway

QUESTIONS = ("When is breakfast?", "Is there a pool?", "Where is the key?", "Who is at the desk?", "May I stay until two?")
ORDERS = ("Wake me at seven.", "Bring me the key.", "Close the window.", "Call a taxi, please.", "Leave the lamp on.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub id, directory, or the built-in model")
    parser.add_argument("--quantize", choices=["none", "int8", "nf4"], default="none")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    quantize = None if given.quantize == "none" else given.quantize
    model, tokenizer = byway.load_base(given.model, task="classification", num_labels=2, quantize=quantize)
    adapter = byway.attach(model, byway.LoRA(rank=8, alpha=16, targets="all-linear", modules_to_save=["score"]))
    print(adapter.summary())

    texts = [(text, label) for label, group in enumerate((QUESTIONS, ORDERS)) for text in group]
    rows = [{**tokenizer(text), "labels": label} for text, label in texts]
    settings = TrainingArguments(
        str(given.output / "run"),
        max_steps=given.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=5,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    print(f"loss: {trainer.state.log_history[0]['loss']:.4f} → {trainer.evaluate()['eval_loss']:.4f}")

    # HF PEFT can read this directory, too; byway.load(model, saved) attaches it again
    saved = adapter.save(given.output / "adapter")
    print(f"adapter: {saved}")


if __name__ == "__main__":
    main()
