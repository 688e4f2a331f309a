"""The sections of a recipe: their keys, types and limits. The string under a field is its documentation.

A section is a value (frozen, comparable, picklable). It checks itself when it is constructed, in Python as well as from
a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from byway.core.disk.paths import path_problem
from byway.core.fields import Count, Entry, Later, NotNegative, Positive, Text, shown, valid
from byway.errors import ConfigError

__all__ = ["Base", "Data", "Engine", "Section", "Train"]

Switch = Literal["auto", "on", "off"]
Fraction = Annotated[float, Ge(0), Lt(1)]
_LATER_TASKS = Later(
    "token_classification", "ner", "question_answering", "qa", "squad", "seq2seq", "summarization", "translation", "speech", "image",
    "image_classification", "multiple_choice", "regression", "preference", "dpo",
)  # fmt: skip
Files = Text | Annotated[tuple[Text, ...], MinLen(1)]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of the sections: checks every field against its annotation."""

    def __post_init__(self) -> None:
        for name, value in valid(self, f"{type(self).__name__.lower()}.").items():
            object.__setattr__(self, name, value)
        problems = self.contradictions()
        if problems:
            raise ConfigError("; ".join(problems))

    def contradictions(self) -> list[str]:
        """Name every combination of valid values that cannot work."""
        return []


def unusable_paths(section: str, names: Mapping[str, str | Sequence[str] | None]) -> list[str]:
    """Name each file or directory, by its key, that cannot exist."""
    each = [(key, name) for key, given in names.items() for name in ((given,) if isinstance(given, str) else given or ())]
    return [f"{section}.{key} {shown(name)} {why}" for key, name in each if (why := path_problem(name))]


@dataclass(frozen=True, kw_only=True)
class Base(Section):
    """The frozen base model."""

    model: Text = "smollm2-135m-instruct"
    """The built-in default, a directory, a .gguf file, or a hub id ("owner/name")."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the base's weights; auto: as stored."""
    compute: Literal["auto", "same", "fp32", "int8"] = "auto"
    """Data type of matrix products: same as `dtype`, fp32 (weights are widened piece by piece), or int8 (approximate);
    auto: same, but fp32 for a bf16 base on a CPU without bf16 instructions."""
    quantize: Literal["int8", "nf4"] | None = None
    """Quantize the base's linear maps while loading (needs byway[quant])."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: a GPU if there is one."""
    add_tokens: tuple[Text, ...] = ()
    """Tokens to add to the vocabulary. Their rows in the embedding and the head are trained with the method (lora, dora
    or full) and saved in the adapter."""

    def contradictions(self) -> list[str]:
        found: list[str] = []
        if self.dtype == "fp16" and self.device == "cpu":
            found.append("base.dtype fp16 and base.device cpu do not go together: fp16 trains on a GPU only; use bf16 or fp32")
        if self.compute == "int8" and self.quantize is not None:
            why = "a quantized base has its own matrix products; leave one of them out"
            found.append(f"base.compute int8 and base.quantize {self.quantize} do not go together: {why}")
        if len(set(self.add_tokens)) < len(self.add_tokens):
            found.append("base.add_tokens contains the same token twice")
        return found


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """The rows to train and evaluate on, and how they become tokens."""

    train: Files
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a list of files, or "hub:owner/name"."""
    eval: Files | None = None
    """Rows to evaluate on, written like `train`."""
    task: Annotated[
        str,
        Entry("byway.tasks", apart=("task", "causal_lm")),
        _LATER_TASKS,
    ] = "chat"
    """What the model learns: to answer in a chat, to continue text, to classify, or a task of your own."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "tokens", "classification"] = "auto"
    """Format of the rows; auto: detected from all rows and reported."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """Key of the format → key in your rows, for instance {prompt: question, completion: answer}."""
    max_length: Annotated[int, Ge(2), Le(10**8)] = 1024
    """Maximum length of a row, in tokens."""
    overflow: Literal["truncate", "drop", "split"] = "truncate"
    """What to do with longer rows: cut off the end, leave them out, or split them into windows. The number of such rows
    is reported."""
    template: Text | None = None
    """Chat template that replaces the model's: a .jinja file, or Jinja text."""
    template_variables: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Variables for the chat template, for instance {enable_thinking: false}; those of a row (`chat_template_kwargs`)
    come first."""
    learn: Literal["responses", "last", "all"] = "responses"
    """Tokens in the loss: the assistant's turns, its last turn, or all tokens."""
    labels: Annotated[tuple[str, ...], MinLen(2)] | None = None
    """For classification: names of the classes, in the order of their ids; null: taken from the rows."""
    limit: Count | None = None
    """Use only the first N training rows."""
    eval_limit: Count | None = None
    """Use only the first N evaluation rows."""
    eval_fraction: Annotated[float, Gt(0), Lt(1)] | None = None
    """Fraction of the training rows to evaluate on instead of training on them; the same rows in every run with the
    same seed."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and report them, instead of stopping."""

    @property
    def evaluates(self) -> bool:
        """True if there are rows to evaluate on."""
        return self.eval is not None or self.eval_fraction is not None

    def contradictions(self) -> list[str]:
        names = {"train": self.train, "eval": self.eval, "template": None if "{" in (self.template or "") else self.template}
        found = unusable_paths("data", names)
        if self.eval is not None and self.eval_fraction is not None:
            found.append("data.eval and data.eval_fraction are both given; use one of them")
        if self.eval_limit is not None and not self.evaluates:
            found.append("data.eval_limit is given without data.eval or data.eval_fraction: there are no evaluation rows to limit")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            found.append("data.labels contains the same name twice")
        found += [f"data.template_variables {why}" for why in map(_variable_problem, self.template_variables.items()) if why]
        return found


def _variable_problem(entry: tuple[str, Any]) -> str:
    """Say why a template variable cannot be used; ``""`` if it can."""
    name, value = entry
    if not name.isidentifier() or name in ("messages", "tools", "documents", "add_generation_prompt"):
        return f"has {name!r}, which is not the name of a variable that can be set"
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return f"has {name}: {shown(value)}, which is not a JSON value"
    return ""


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """Length of the run, step size, optimizer, evaluations and checkpoints."""

    epochs: Annotated[float, Gt(0), Le(10_000)] = 1.0
    """Number of passes over the training rows; may be a fraction."""
    max_steps: Count | None = None
    """Number of optimizer steps, in place of `epochs`."""
    learning_rate: Annotated[float, Gt(0), Le(100)] = 2e-4
    """Peak learning rate, reached after the warm-up."""
    tokens_per_step: Count | None = None
    """Tokens per optimizer step, without padding; 8192 if `rows_per_step` is not given either."""
    rows_per_step: Count | None = None
    """Rows per optimizer step, in place of `tokens_per_step`."""
    micro_batch_tokens: Literal["auto"] | Count = "auto"
    """Maximum number of tokens in one forward pass; a step is split into as many micro-batches as needed."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_ratio: Fraction | None = None
    """Fraction of the steps in which the learning rate rises from zero; 0.03 if `warmup_steps` is not given either."""
    warmup_steps: Annotated[int, Ge(0), Le(10**9)] | None = None
    """Length of the warm-up in steps, in place of `warmup_ratio`."""
    label_smoothing: Fraction = 0.0
    """Spread this fraction of each target over the whole vocabulary or all classes. Applies to the training loss, not
    to evaluations."""
    z_loss: NotNegative = 0.0
    """Coefficient of (log Z)², added to the loss of each label, where Z normalizes the softmax (PaLM: 1e-4). Applies to
    the training loss, not to evaluations."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """Clip the norm of the gradients to this value; null: no clipping."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay rate of the second moment."""
    adam_epsilon: Annotated[float, Gt(0), Le(1)] = 1e-8
    """AdamW's ε, added to the denominator."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    """Seed of the order of the rows, the adapter's initial values and dropout."""
    eval_every: Count | None = None
    """Evaluate every N steps; null: after every epoch."""
    save_every: Count | None = None
    """Save a checkpoint every N steps; null: at every evaluation and at the end."""
    keep_checkpoints: Count = 2
    """Number of checkpoints to keep."""
    patience: Count | None = None
    """Stop after N evaluations without improvement; null: never."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs byway[track])."""
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    """Number of torch's CPU threads; null: torch's default. A bit-exact resume needs the same number."""

    def __post_init__(self) -> None:
        if self.tokens_per_step is None and self.rows_per_step is None:
            object.__setattr__(self, "tokens_per_step", 8192)
        if self.warmup_ratio is None and self.warmup_steps is None:
            object.__setattr__(self, "warmup_ratio", 0.03)
        super().__post_init__()

    def contradictions(self) -> list[str]:
        found: list[str] = []
        for first, second in (("tokens_per_step", "rows_per_step"), ("warmup_ratio", "warmup_steps")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                found.append(f"train.{second} and train.{first} are both given; set one of them to null")
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.max_steps:
            found.append(f"train.warmup_steps is {self.warmup_steps} and train.max_steps {self.max_steps}: the warm-up would never end")
        return found


@dataclass(frozen=True, kw_only=True)
class Engine(Section):
    """Optimizations that a frozen base makes possible. auto: on if the loss and gradients of a probe batch stay the
    same."""

    pack: Switch = "auto"
    """Pack rows into one sequence without padding; each attends only to itself."""
    share_prefix: Switch = "auto"
    """Compute a prefix that several rows of a batch share, such as a system prompt, once; auto: if that saves enough
    tokens."""
    labels_only: Switch = "auto"
    """Compute logits only for tokens in the loss."""
    last_layer: Switch = "auto"
    """Compute the last layer only at positions whose output is used: the one token per row that a classifier reads, or
    the tokens that predict a token in the loss; auto: if that saves enough."""
    frontier: Switch = "auto"
    """Keep no activations below the lowest trained layer; frozen layers below it, and everything that feeds them, run
    without dropout."""
    recompute: Switch = "auto"
    """Recompute norms and activation functions in the backward pass instead of keeping their outputs; auto: if memory
    is short."""
    checkpointing: Switch = "auto"
    """Recompute whole layers in the backward pass, which takes more time and less memory: on, all layers that keep
    activations; auto: as many as needed to stay within `memory_mb`."""
    memory_mb: Count | None = None
    """Memory the run may use (peak of the process, or of the GPU), in MB; null: 90% of what the machine or its
    container has."""
    cache: Literal["off", "auto"] | Text = "off"
    """Cache the frozen layers' output for every row, for later epochs and runs: off, auto (in Byway's cache directory,
    if the output can be cached and fits), or a directory (an error if it cannot be cached)."""
    cache_dtype: Literal["same", "bf16", "int8"] = "same"
    """Data type in the cache: same is exact; bf16 and int8 are approximations whose error is reported."""
    cache_limit_gb: Positive = 20.0
    """Maximum size of the cache in GB. The least recently used entries are evicted; entries in use never are."""
    levers: tuple[Text, ...] = ()
    """Further optimizations of your own, by import path (``mypackage.toy:Toy``); each is tested on the probe like the
    built-in ones."""
    compile: Annotated[Literal["off"], Later("on", "auto")] = "off"
    """Compile the model with torch.compile."""

    def contradictions(self) -> list[str]:
        found = unusable_paths("engine", {"cache": self.cache})
        if self.cache in _NO_DIRECTORIES:
            found.append(f"engine.cache is {self.cache!r}; it must be off, auto or a directory (./{self.cache} for one of that name)")
        if self.cache == "off" and self.cache_dtype != "same":
            found.append(f"engine.cache_dtype is {self.cache_dtype}, but engine.cache is off")
        return found


_NO_DIRECTORIES = ("on", "yes", "no", "true", "false", "none", "null", "ON", "On", "Off", "OFF", "Auto", "AUTO")
"""Values that are more likely meant as a switch than as the name of a directory."""
