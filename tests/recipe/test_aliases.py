"""What other trainers call our keys: each row of the table, what they become, and the collisions."""

from __future__ import annotations

import re
from typing import Any

import pytest

import byway
from byway.core.fields import hints
from byway.errors import ConfigError
from byway.recipe.aliases import ALIASES, meant
from byway.recipe.reading import SECTIONS
from byway.recipe.recipe import Recipe

SMALL: dict[str, Any] = {"method": {"name": "lora"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}

TRL = {
    "model_name_or_path": "gpt2", "train_file": "a.jsonl", "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": ["c_attn"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "num_train_epochs": 3,
    "learning_rate": 1e-4, "max_length": 512, "load_in_4bit": True, "bf16": True, "output_dir": "runs/trl", "packing": False, "seed": 7,
    "gradient_checkpointing": True, "lr_scheduler_type": "linear", "warmup_ratio": 0.1, "max_steps": -1, "report_to": "none",
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path": "gpt2", "train_file": "a.jsonl", "finetuning_type": "lora", "lora_rank": 16, "lora_target": "q_proj,v_proj",
    "cutoff_len": 2048, "quantization_bit": 8, "max_samples": 100, "val_size": 0.1, "mask_history": True, "use_rslora": True,
    "per_device_train_batch_size": 2, "num_train_epochs": 1.0, "output_dir": "runs/lf", "additional_target": "embed_tokens,lm_head",
}  # fmt: skip
AXOLOTL = {
    "base_model": "gpt2", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_target_linear": True, "sequence_len": 4096,
    "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 4, "lr_scheduler": "cosine", "output_dir": "runs/ax",
    "train_on_inputs": False, "sample_packing": True, "val_set_size": 0, "train_file": "a.jsonl",
}  # fmt: skip
MINDFORMERS = {
    "model": {"model_config": {"pet_config": {
        "pet_type": "lora", "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.05, "lora_a_init": "normal",
        "target_modules": ".*wq|.*wk|.*wv|.*wo",
    }}},
    "runner_config": {"batch_size": 4, "epochs": 2},
    "data": {"train": "a.jsonl"},
    "output_dir": "runs/mf",
}  # fmt: skip


def test_a_flat_trl_file() -> None:
    r = Recipe.from_dict(TRL)
    assert r.method == (byway.LoRA(rank=8, alpha=16, dropout=0.05, targets=["c_attn"]),)  # type: ignore[arg-type]
    assert (r.base.model, r.base.quantize, r.base.dtype, r.output) == ("gpt2", "nf4", "bf16", "runs/trl")
    assert (r.train.rows_per_step, r.train.tokens_per_step, r.train.epochs, r.train.seed, r.train.max_steps) == (32, None, 3, 7, None)
    assert (r.train.schedule, r.train.warmup_ratio, r.train.learning_rate, r.train.tensorboard) == ("linear", 0.1, 1e-4, False)
    assert (r.engine.pack, r.engine.checkpointing, r.data.max_length) == ("off", "on", 512)
    assert "lora_r: 8 is read as method.rank: 8" in r.notes
    assert "per_device_train_batch_size x gradient_accumulation_steps is read as train.rows_per_step: 32" in r.notes


def test_a_llama_factory_file() -> None:
    r = Recipe.from_dict(LLAMA_FACTORY)
    wanted = byway.LoRA(rank=16, targets=("q_proj", "v_proj"), rank_stabilized=True, modules_to_save=("embed_tokens", "lm_head"))
    assert r.method == (wanted,) and r.base.quantize == "int8"
    assert (r.data.max_length, r.data.limit, r.data.eval_fraction, r.data.learn, r.train.rows_per_step) == (2048, 100, 0.1, "last", 2)


def test_an_axolotl_file() -> None:
    r = Recipe.from_dict(AXOLOTL)
    assert r.method == (byway.LoRA(rank=32, targets="all-linear"),) and r.base.quantize == "nf4"
    assert (r.train.rows_per_step, r.train.epochs, r.data.learn, r.engine.pack, r.data.eval_fraction) == (8, 4, "responses", "on", None)


def test_a_mindformers_block() -> None:
    r = Recipe.from_dict(MINDFORMERS)
    lora: Any = r.method[0]
    assert (lora.rank, lora.alpha, lora.dropout, lora.init) == (16, 16.0, 0.05, "gaussian")
    assert (r.train.rows_per_step, r.train.epochs) == (4, 2)
    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"] + [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert [bool(re.fullmatch(lora.targets, path)) for path in paths] == [True] * 4 + [False] * 3


def test_every_alias_leads_to_a_key_that_exists() -> None:
    from byway import methods

    known = {f"{s}.{name}" for s, cls in SECTIONS.items() for name in hints(cls)} | {"output", "method.name", "method.start"}
    known |= {f"method.{name}" for m in methods.names() for name in hints(methods.load(m))}
    for alias in ALIASES:
        sets = {key for values in (alias.values or {}).values() for key in values}
        assert {alias.key, *sets} <= known, alias.names


def test_no_name_stands_in_two_rows_of_one_section() -> None:
    seen = [(alias.key.split(".")[0], alias.block_only, name) for alias in ALIASES for name in alias.names.split()]
    assert len(seen) == len(set(seen))
    flat = [name for _, block_only, name in seen if not block_only]
    assert len(flat) == len(set(flat))


def test_a_value_of_an_alias_is_compared_with_its_type() -> None:
    four_bit = next(alias for alias in ALIASES if "load_in_4bit" in alias.names)
    assert meant(four_bit, True) == {"base.quantize": "nf4"} and meant(four_bit, False) == {} and meant(four_bit, None) == {}
    assert meant(four_bit, 1) is None and meant(four_bit, "yes") is None


PEFT_AND_TRAINER = {
    "r": 8, "lora_alpha": 16, "bias": "none", "task_type": "CAUSAL_LM", "optim": "paged_adamw_8bit", "logging_steps": 10,
    "load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4",
    "data": {"train": "x.jsonl"}, "output": "runs/x",
}  # fmt: skip


def test_keys_of_peft_and_trainer_without_an_effect_are_named() -> None:
    r = Recipe.from_dict(PEFT_AND_TRAINER)
    assert r.method == (byway.LoRA(rank=8, alpha=16),) and r.base.quantize == "nf4"
    for key in ("task_type", "optim", "logging_steps", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        assert [note for note in r.notes if note.startswith(f"{key}: ") and "has no effect" in note], key
    trained = Recipe.from_dict(PEFT_AND_TRAINER | {"bias": "lora_only"})
    assert trained.method == (byway.LoRA(rank=8, alpha=16, bias="lora_only"),)


@pytest.mark.parametrize("section", ["method", "train", "base"])
def test_a_key_without_an_effect_may_stand_in_a_section(section: str) -> None:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    values[section] = {**values.get(section, {}), "task_type": "CAUSAL_LM", "logging_steps": 5}
    assert sum("has no effect" in note for note in Recipe.from_dict(values).notes) == 2


@pytest.mark.parametrize(("key", "value"), [("optim", "sgd"), ("optim", "adafactor"), ("task_type", "SEQ_CLS")])
def test_a_value_that_would_change_what_is_trained_is_not_ignored(key: str, value: str) -> None:
    message = refusal(SMALL | {key: value})
    assert key in message and value in message


def refusal(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(values, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "first", "second"),
    [
        (SMALL | {"method": {"name": "lora", "rank": 4, "r": 4}}, "method.r", "method.rank"),
        (SMALL | {"method": {"name": "lora", "rank": 4}, "lora_r": 4}, "lora_r", "method.rank"),
        (SMALL | {"lora_r": 4, "lora_rank": 8}, "lora_rank", "lora_r"),
        (SMALL | {"train": {"rows_per_step": 4}, "batch_size": 4}, "train.rows_per_step", "batch_size"),
        (SMALL | {"batch_size": 4, "micro_batch_size": 4}, "micro_batch_size", "batch_size"),
        (SMALL | {"output_dir": "y"}, "output_dir", "output"),
        (SMALL | {"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit", "load_in_4bit"),
        (SMALL | {"finetuning_type": "lora"}, "finetuning_type", "method.name"),
    ],
)
def test_two_spellings_of_one_key_are_an_error_that_names_both(values: dict[str, Any], first: str, second: str) -> None:
    message = refusal(values)
    assert first in message and second in message and "both set" in message


def test_two_switches_that_say_the_same_agree() -> None:
    r = Recipe.from_dict(SMALL | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bf16": True, "torch_dtype": "bfloat16"})
    assert r.base.quantize == "nf4" and r.base.dtype == "bf16"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (SMALL | {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps stands alone"),
        (SMALL | {"batch_size": 0}, "batch_size is 0; it must be an integer from 1"),
        (SMALL | {"batch_size": True}, "batch_size is true"),
        (SMALL | {"load_in_4bit": 1}, "load_in_4bit is 1; it must be true or false"),
        (SMALL | {"lora_r": "8"}, "lora_r (method.rank) is '8'; it must be an integer"),
        (SMALL | {"torch_compile": True}, "torch_compile (engine.compile) is 'on', which does not exist yet"),
        (SMALL | {"finetuning_type": "galore", "method": {"rank": 3}}, "finetuning_type is 'galore'; it must be"),
        (SMALL | {"method": [{"name": "lora"}, {"name": "lora"}], "lora_r": 3}, "say which: method.0.rank"),
        ({**SMALL, "model": {"model_config": {"num_layers": 3}}}, "unknown key 'model.model_config.num_layers'"),
        ({**SMALL, "pet_config": {"lora_alpa": 3}}, "unknown key 'pet_config.lora_alpa'"),
    ],
)
def test_an_alias_with_a_value_that_cannot_be_is_named_as_typed(values: dict[str, Any], part: str) -> None:
    assert part in refusal(values)


def test_an_alias_as_override_takes_the_place_of_the_key_in_the_file() -> None:
    full = SMALL | {"method": {"name": "lora", "rank": 4}, "train": {"rows_per_step": 4}}
    r = Recipe.from_dict(full, ["lora_r=2", "per_device_train_batch_size=3", "gradient_accumulation_steps=5"])
    assert r.method == (byway.LoRA(rank=2),) and r.train.rows_per_step == 15
    assert Recipe.from_dict(SMALL | {"batch_size": 3}, ["train.rows_per_step=2"]).train.rows_per_step == 2
    assert Recipe.from_dict(SMALL | {"batch_size": 3, "gradient_accumulation_steps": 2}, ["batch_size=5"]).train.rows_per_step == 10


def test_a_lora_key_alone_means_lora() -> None:
    r = Recipe.from_dict({"lora_alpha": 4, "method": {"rank": 2}, "data": {"train": "x"}, "output": "y"})
    assert r.method == (byway.LoRA(rank=2, alpha=4),) and "lora_alpha implies method.name: lora" in r.notes
