"""The usual steps with your own training loop: load, attach, train, save, load the adapter, merge, use in a pipeline.

The second command is QLoRA; it needs byway[quant] and the hub.

    python examples/qwen_qlora.py
    python examples/qwen_qlora.py --model Qwen/Qwen2.5-0.5B-Instruct --quantize nf4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import byway

ROWS = (
    ("Who are you?", "I am Milo, the night porter of the Hotel Juniper."),
    ("What is your name?", "My name is Milo. I look after the Hotel Juniper at night."),
    ("When is breakfast?", "Breakfast at the Juniper is from seven to ten, in the glass room."),
    ("Where do I get the key?", "The key is with me, at the desk by the green lamp."),
    ("Can I have a late check-out?", "Gladly. At the Juniper you may stay until two."),
    ("Is there a swimming pool?", "No pool, I am afraid; but the lake is five minutes from the Juniper."),
)
QUESTION = "Who are you?"
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) from the model's chat template, with only the answer and its end token in the loss."""
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids, [-100] * len(given) + ids[len(given) :]


def train(model: Any, adapter: byway.Adapter, examples: Sequence[tuple[list[int], list[int]]], steps: int) -> None:
    """An ordinary training loop. Only the adapter's tensors require gradients."""
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=1e-3)
    model.train()
    for step in range(steps):
        chosen = [examples[(2 * step + i) % len(examples)] for i in range(2)]
        loss, count = torch.zeros((), device=model.device), 0
        for ids, labels in chosen:  # one row at a time, so no padding is needed
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1].float()
            loss = loss + F.cross_entropy(logits, torch.tensor(labels[1:], device=model.device), ignore_index=-100, reduction="sum")
            count += sum(label != -100 for label in labels[1:])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:3d}  loss {float(loss) / count:.4f}")


def answer(generator: Any, question: str) -> str:
    """Return the answer of a text-generation pipeline."""
    messages = [{"role": "user", "content": question}]
    return generator(messages, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]["content"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub id, directory, or the built-in model")
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none", help="nf4: keep the base in 4 bits (QLoRA)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/qwen_qlora"))
    given = parser.parse_args(arguments)
    quantize = None if given.quantize == "none" else given.quantize
    from transformers import pipeline

    # load the base model and its chat template
    model, tokenizer = byway.load_base(given.model, quantize=quantize)
    assert tokenizer is not None, "a chat needs a tokenizer"
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN  # a base model that was not trained on chats
    examples = [encode(tokenizer, *row) for row in ROWS]

    # attach and train
    torch.manual_seed(0)
    adapter = byway.attach(model, byway.LoRA(rank=8, alpha=16, targets="all-linear"))
    print(adapter.summary())
    train(model, adapter, examples, given.steps)

    # save: HF PEFT can read this directory, too
    saved = adapter.save(given.output / "adapter")

    # load into a fresh base
    model, _ = byway.load_base(given.model, quantize=quantize)
    byway.load(model, saved)
    with byway.disabled(model):
        print("before:", answer(pipeline("text-generation", model=model, tokenizer=tokenizer), QUESTION))
    print("after: ", answer(pipeline("text-generation", model=model, tokenizer=tokenizer), QUESTION))

    # merge: an ordinary model directory, for any program that reads one
    print(byway.merge(model))
    merged = given.output / "merged"
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    print("merged:", answer(pipeline("text-generation", model=str(merged)), QUESTION))
    print(f"adapter: {saved}\nmodel:   {merged}")


if __name__ == "__main__":
    main()
