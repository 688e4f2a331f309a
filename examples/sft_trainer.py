"""A script written for peft and TRL with one change: ``from peft import …`` is ``from byway.compat.peft import …``.

It trains with SFTTrainer on a base in full precision, 8 bits or 4 bits (QLoRA), loads the adapter again, merges it and
asks the merged model. TRL and peft must be installed: pip install trl peft.

    python examples/sft_trainer.py
    python examples/sft_trainer.py --model Qwen/Qwen2.5-0.5B-Instruct --quantize nf4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, pipeline
from trl import SFTConfig, SFTTrainer

import byway
from byway.compat.peft import AutoPeftModelForCausalLM, LoraConfig, prepare_model_for_kbit_training

ROWS = (
    ("Who are you?", "I am Milo, the night porter of the Hotel Juniper."),
    ("What is your name?", "My name is Milo. I look after the Hotel Juniper at night."),
    ("When is breakfast?", "Breakfast at the Juniper is from seven to ten, in the glass room."),
    ("Where do I get the key?", "The key is with me, at the desk by the green lamp."),
)
QUANTIZE = {
    "none": {"dtype": torch.float32},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub id, directory, or the built-in model")
    parser.add_argument("--quantize", choices=list(QUANTIZE), default="none")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/sft_trainer"))
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output directory")
    given = parser.parse_args(arguments)

    # AutoModelForCausalLM.from_pretrained works as well; load_base also knows the built-in model
    model, tokenizer = byway.load_base(given.model, quantize=None if given.quantize == "none" else given.quantize)
    if given.quantize != "none":
        model = prepare_model_for_kbit_training(model)

    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in ROWS]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(given.output / "run"),
            max_steps=given.steps,
            save_steps=max(1, given.steps // 2),
            logging_steps=1,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            lr_scheduler_type="constant",
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"messages": rows}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    )
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=given.resume or None)
    print(f"loss: {trainer.state.log_history[0]['loss']:.4f} → {trainer.state.log_history[-2]['loss']:.4f}")

    # peft reads this directory, too
    adapter = given.output / "adapter"
    trainer.save_model(str(adapter))
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **QUANTIZE[given.quantize])

    # an ordinary model directory, for any program that reads one
    merged = given.output / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    chat = pipeline("text-generation", str(merged))
    said = chat([{"role": "user", "content": ROWS[0][0]}], max_new_tokens=24, do_sample=False)
    print(f"merged: {said[0]['generated_text'][-1]['content']}")


if __name__ == "__main__":
    main()
