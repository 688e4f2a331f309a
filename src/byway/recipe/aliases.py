"""The names that other trainers give Byway's keys, as one table; no code knows any of the names.

A name is understood at the top level of a recipe (the flat files of trl, axolotl, LLaMA-Factory) and in the section of
its key (``method: {r: 8}``). `BLOCKS` are the nested sections of MindFormers. There is a row only for keys that Byway
has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ALIASES", "BLOCKS", "IGNORED", "Alias", "Ignored", "find", "ignored", "meant"]


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One key, and other names for it."""

    names: str
    """Separated by spaces."""
    key: str
    """Byway's key: ``section.field``, or ``output``."""
    values: Mapping[Any, Mapping[str, Any]] | None = None
    """If only some values are understood: value → Byway's keys that it sets. Strings are compared in lower case."""
    convert: Callable[[Any], Any] | None = None
    """Value → Byway's value, if it is written differently."""
    implies: str = ""
    """The method that is meant if the recipe names none."""
    factor: bool = False
    """True if the values given for one key under several names are multiplied."""
    needs: str = ""
    """For a factor that means nothing on its own: the name of the other factor."""
    block_only: bool = False
    """True if it is understood in MindFormers' blocks only, because the name means something else elsewhere."""


def _names_or_all(value: Any) -> Any:
    """Read LLaMA-Factory's and unsloth's ``all`` and ``q_proj,v_proj``."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear"):
        return "all-linear"
    words = [word.strip() for word in value.split(",")]
    return words if all(re.fullmatch(r"[\w.]+", word) for word in words) else value


_CELLS = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip


def _cells(value: Any) -> Any:
    """Rewrite MindFormers' pattern, matched from the start of a cell's name (``.*wq``), to match the module path."""
    if not isinstance(value, str):
        return value
    pattern = re.sub(r"\b(?:\.\*)?(w[qkvo123])\b", lambda match: match[0].replace(match[1], _CELLS[match[1]]), value)
    return rf"(?:.*\.)?(?:{pattern})[^.]*"


def _comma_list(value: Any) -> Any:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


def _adapter_directory(value: Any) -> Any:
    """Return the directory of an adapter's file."""
    return os.path.dirname(value) or "." if isinstance(value, str) and value.endswith(".safetensors") else value


def _hub(value: Any) -> Any:
    return f"hub:{value}" if isinstance(value, str) and not value.startswith("hub:") else value


_LORA = {"method.name": "lora"}


def _switch(key: str) -> dict[Any, dict[str, Any]]:
    return {True: {key: "on"}, False: {key: "off"}}


def _if_true(key: str, value: str) -> dict[Any, dict[str, Any]]:
    return {True: {key: value}, False: {}}


_METHOD_NAMES: dict[Any, dict[str, Any]] = {
    name: {"method.name": ours}
    for name, ours in {
        "lora": "lora", "dora": "dora", "adalora": "adalora", "ia3": "ia3", "prompt_tuning": "prompt_tuning", "p_tuning": "p_tuning",
        "prefix_tuning": "prefix_tuning", "ptuning2": "p_tuning_v2", "prefixtuning": "prefix_tuning", "full": "full",
    }.items()
}  # fmt: skip
_DTYPES: dict[Any, dict[str, Any]] = {
    name: {"base.dtype": ours}
    for ours, names in {"fp32": "float32 fp32 float", "bf16": "bfloat16 bf16", "fp16": "float16 fp16 half", "auto": "auto"}.items()
    for name in names.split()
}
_OPTIONAL_BITS: dict[Any, dict[str, Any]] = {4: {"base.quantize": "nf4"}, 8: {"base.quantize": "int8"}, None: {}}

ALIASES: tuple[Alias, ...] = (
    # base
    Alias(names="model_name_or_path base_model model", key="base.model"),
    Alias(names="dtype torch_dtype", key="base.dtype", values=_DTYPES),
    Alias(names="bf16", key="base.dtype", values=_if_true("base.dtype", "bf16")),
    Alias(names="fp16", key="base.dtype", values=_if_true("base.dtype", "fp16")),
    Alias(names="load_in_4bit", key="base.quantize", values=_if_true("base.quantize", "nf4")),
    Alias(names="load_in_8bit", key="base.quantize", values=_if_true("base.quantize", "int8")),
    Alias(names="quantization_bit", key="base.quantize", values=_OPTIONAL_BITS),
    Alias(names="bnb_4bit_quant_type", key="base.quantize", values={"nf4": {"base.quantize": "nf4"}}),
    # method
    Alias(names="finetuning_type peft_type pet_type fine_tune_type", key="method.name", values=_METHOD_NAMES),
    Alias(names="adapter", key="method.name", values={"lora": _LORA, "qlora": {**_LORA, "base.quantize": "nf4"}}),
    Alias(names="adapter_name_or_path lora_model_dir resume_adapter_file", key="method.start", convert=_adapter_directory),
    Alias(names="use_peft", key="method.name", values={True: _LORA}),
    Alias(names="use_dora peft_use_dora", key="method.name", values=_if_true("method.name", "dora")),
    Alias(names="r lora_r lora_rank", key="method.rank", implies="lora"),
    Alias(names="lora_alpha", key="method.alpha", implies="lora"),
    Alias(names="lora_dropout", key="method.dropout", implies="lora"),
    Alias(names="target_modules", key="method.targets", convert=_cells, implies="lora", block_only=True),
    Alias(names="target_modules lora_target_modules lora_target", key="method.targets", convert=_names_or_all, implies="lora"),
    Alias(names="lora_target_linear", key="method.targets", values=_if_true("method.targets", "all-linear"), implies="lora"),
    Alias(names="exclude_modules", key="method.exclude", implies="lora"),
    Alias(names="layers_to_transform", key="method.layers", implies="lora"),
    Alias(names="lora_modules_to_save additional_target", key="method.modules_to_save", convert=_comma_list, implies="lora"),
    Alias(names="bias", key="method.bias", implies="lora"),
    Alias(names="use_rslora peft_use_rslora", key="method.rank_stabilized", implies="lora"),
    Alias(names="loraplus_lr_ratio", key="method.plus_ratio", implies="lora"),
    Alias(names="trainable_token_indices", key="method.trained_tokens", implies="lora"),
    Alias(
        names="init_lora_weights",
        key="method.init",
        values={
            True: {"method.init": "kaiming"},
            "gaussian": {"method.init": "gaussian"},
            "pissa": {"method.init": "pissa"},
            "pissa_niter_16": {"method.init": "pissa_fast"},
        },
        implies="lora",
    ),
    Alias(names="lora_a_init", key="method.init", values={"normal": {"method.init": "gaussian"}}, block_only=True, implies="lora"),
    # data
    Alias(names="train_file", key="data.train"),
    Alias(names="validation_file eval_file", key="data.eval"),
    Alias(names="dataset_name", key="data.train", convert=_hub),
    Alias(names="max_length max_seq_length max_seq_len cutoff_len sequence_len seq_length", key="data.max_length"),
    Alias(names="max_samples max_train_samples", key="data.limit"),
    Alias(names="max_eval_samples", key="data.eval_limit"),
    Alias(names="val_size val_set_size", key="data.eval_fraction", convert=lambda value: None if value in (0, 0.0) else value),
    Alias(names="chat_template_path", key="data.template"),
    Alias(names="chat_template_kwargs", key="data.template_variables"),
    Alias(names="train_on_inputs", key="data.learn", values={True: {"data.learn": "all"}, False: {"data.learn": "responses"}}),
    Alias(
        names="assistant_only_loss completion_only_loss",
        key="data.learn",
        values={True: {"data.learn": "responses"}, False: {"data.learn": "all"}},
    ),
    Alias(names="mask_history", key="data.learn", values=_if_true("data.learn", "last")),
    # train
    Alias(names="num_train_epochs num_epochs epochs", key="train.epochs"),
    Alias(names="max_steps", key="train.max_steps", convert=lambda value: None if value == -1 else value),
    Alias(names="learning_rate lr", key="train.learning_rate"),
    Alias(names="per_device_train_batch_size micro_batch_size batch_size", key="train.rows_per_step", factor=True),
    Alias(
        names="gradient_accumulation_steps grad_accumulation_steps",
        key="train.rows_per_step",
        factor=True,
        needs="per_device_train_batch_size",
    ),
    Alias(names="global_batch_size", key="train.rows_per_step"),
    Alias(names="lr_scheduler_type lr_scheduler", key="train.schedule"),
    Alias(names="warmup_ratio", key="train.warmup_ratio"),
    Alias(names="warmup_steps", key="train.warmup_steps"),
    Alias(names="label_smoothing_factor label_smoothing", key="train.label_smoothing"),
    Alias(names="z_loss z_loss_coefficient z_loss_multiplier", key="train.z_loss"),
    Alias(names="weight_decay", key="train.weight_decay"),
    Alias(names="max_grad_norm gradient_clipping", key="train.max_grad_norm"),
    Alias(names="adam_beta1", key="train.adam_beta1"),
    Alias(names="adam_beta2", key="train.adam_beta2"),
    Alias(names="adam_epsilon", key="train.adam_epsilon"),
    Alias(names="seed", key="train.seed"),
    Alias(names="eval_steps steps_per_eval", key="train.eval_every"),
    Alias(names="save_steps", key="train.save_every"),
    Alias(names="save_total_limit", key="train.keep_checkpoints"),
    Alias(names="early_stopping_patience", key="train.patience"),
    Alias(
        names="report_to",
        key="train.tensorboard",
        values={"tensorboard": {"train.tensorboard": True}, "none": {"train.tensorboard": False}},
    ),
    # engine
    Alias(names="packing sample_packing", key="engine.pack", values=_switch("engine.pack")),
    Alias(names="gradient_checkpointing activation_checkpointing", key="engine.checkpointing", values=_switch("engine.checkpointing")),
    Alias(names="torch_compile", key="engine.compile", values=_switch("engine.compile")),
    # output
    Alias(names="output_dir out_dir adapter_path", key="output"),
)


@dataclass(frozen=True, kw_only=True)
class Ignored:
    """Keys of other trainers that have no effect here, which a note says."""

    names: str
    """Separated by spaces."""
    why: str
    values: tuple[str, ...] = ()
    """The values that may be ignored, in lower case; others would change what is trained. Empty: any value."""


IGNORED: tuple[Ignored, ...] = (
    Ignored(
        names="optim",
        why="the optimizer is AdamW with 32-bit moments",
        values=(
            *("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"),
            *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit"),
        ),
    ),
    Ignored(names="task_type", why="data.task says what is trained", values=("causal_lm",)),
    Ignored(names="logging_steps logging_strategy logging_first_step", why="every step is written to metrics.jsonl"),
    Ignored(names="bnb_4bit_use_double_quant", why="nf4 always quantizes its scales as well (double quantization)"),
    Ignored(names="bnb_4bit_compute_dtype", why="products with 4-bit weights are computed in base.dtype"),
    Ignored(names="fan_in_fan_out", why="how a weight is stored is read from the model"),
    Ignored(names="dataloader_num_workers group_by_length remove_unused_columns", why="rows are tokenized once and packed"),
)

BLOCKS: Mapping[tuple[str, ...], str] = {
    ("pet_config",): "method",
    ("model", "pet_config"): "method",
    ("model", "model_config", "pet_config"): "method",
    ("method", "pet_config"): "method",
    ("runner_config",): "train",
}
"""MindFormers' nested sections → the section that their names belong to."""


def meant(alias: Alias, value: Any) -> Mapping[str, Any] | None:
    """Return what `value` sets, as Byway's keys → values; None if the alias does not understand this value."""
    if alias.values is None:
        return {alias.key: value if alias.convert is None else alias.convert(value)}
    word = value.lower() if isinstance(value, str) else value
    if word is None:
        return {}
    return next((sets for said, sets in alias.values.items() if type(said) is type(word) and said == word), None)


def find(name: str, section: str | None, *, block: bool = False) -> Alias | None:
    """Return the alias `name` at the top level (`section` None), in a section, or in a MindFormers block of it."""
    for alias in ALIASES:
        if name in alias.names.split() and (block or not alias.block_only) and section in (None, alias.key.split(".")[0]):
            return alias
    return None


def ignored(name: str) -> Ignored | None:
    """Return the entry of a key that has no effect, in whichever section it stands."""
    return next((entry for entry in IGNORED if name in entry.names.split()), None)
