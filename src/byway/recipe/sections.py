"""The recipe's sections: which keys there are, what they mean, what is allowed. The string under a field is its documentation.

Each is a value (frozen, comparable, picklable) and checks itself when it is made, in Python as well as from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import Field

from byway.core.fields import Later, checked
from byway.errors import ConfigError

__all__ = ["Base", "Data", "Engine", "Section", "Train"]

Switch = Literal["auto", "on", "off"]
Whole = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the sections share: every field is checked against its annotation."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for f in fields(self):
            value, problem = checked(type(self), f.name, getattr(self, f.name))
            if problem:
                problems.append(f"{type(self).__name__.lower()}.{f.name} {problem}")
            else:
                object.__setattr__(self, f.name, value)
        problems = problems or [why for _, why in self.contradictions()]
        if problems:
            raise ConfigError("; ".join(problems))

    def contradictions(self) -> list[tuple[str, str]]:
        """(field, what is wrong) for values that are right alone and impossible together."""
        return []


@dataclass(frozen=True, kw_only=True)
class Base(Section):
    """The frozen model that everything hangs on."""

    model: Text = "smollm2-135m-instruct"
    """The built-in default, a directory, a .gguf file, or a hub id ("owner/name")."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """In which numbers the base is kept; auto: as it is stored."""
    compute: Literal["auto", "same", "fp32", "int8"] = "auto"
    """How it is multiplied: same, fp32 (widened piece by piece), int8 (approximate); auto: fp32 for bf16 on a CPU that has no bf16."""
    quantize: Literal["int8", "nf4"] | None = None
    """Quantize the base's linear maps while loading (needs byway[quant])."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto: a GPU if there is one."""

    def contradictions(self) -> list[tuple[str, str]]:
        """fp16 needs a GPU; a quantized base multiplies in its own way."""
        found: list[tuple[str, str]] = []
        if self.dtype == "fp16" and self.device == "cpu":
            found.append(
                ("dtype", "base.dtype fp16 and base.device cpu do not go together: fp16 is trained on a GPU only; use bf16 or fp32")
            )
        if self.compute == "int8" and self.quantize is not None:
            why = "a quantized base multiplies in its own way; leave one of them out"
            found.append(("compute", f"base.compute int8 and base.quantize {self.quantize} do not go together: {why}"))
        return found


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """What is learnt from, and how rows become tokens."""

    train: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a list of files, or "hub:owner/name"."""
    eval: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Held-out rows, written like `train`."""
    task: Annotated[Literal["chat", "text", "classification"], Later("token_classification", "question_answering", "seq2seq", "image")] = (
        "chat"
    )
    """What the rows are for: answering, continuing text, or naming a class."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "tokens", "classification"] = "auto"
    """How the rows are written; auto: found out from all rows, and shown."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """The format's key → the rows' own key, for instance {prompt: question, completion: answer}."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """The longest row, in tokens."""
    overflow: Literal["truncate", "drop", "split"] = "truncate"
    """What happens to longer rows: cut at the end, left out, or split into windows; each time counted."""
    template: Text | None = None
    """A chat template in place of the model's: a .jinja file, or Jinja text."""
    learn: Literal["responses", "last", "all"] = "responses"
    """Which tokens are learnt: the assistant's turns, its last turn, or everything."""
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """classification: the names of the classes, in the order of their numbers; null: from the rows."""
    limit: Whole | None = None
    """Use the first so many training rows only."""
    eval_limit: Whole | None = None
    """Use the first so many evaluation rows only."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the training rows; the same rows in every run with the same seed."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, counted and named, instead of stopping."""

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval is not None or self.eval_fraction is not None

    def contradictions(self) -> list[tuple[str, str]]:
        """Held-out rows come from one place; class names and turns belong to their tasks."""
        found: list[tuple[str, str]] = []
        if self.eval is not None and self.eval_fraction is not None:
            found.append(("eval_fraction", "data.eval and data.eval_fraction are both given; held-out rows come from one of them"))
        if self.eval_limit is not None and not self.evaluates:
            found.append(("eval_limit", "data.eval_limit is given without data.eval or data.eval_fraction: there is nothing to limit"))
        if self.labels is not None and self.task != "classification":
            found.append(("labels", f"data.labels names classes, and data.task is {self.task}; it belongs to task classification"))
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            found.append(("labels", "data.labels names a class twice"))
        if self.template is not None and self.task != "chat":
            found.append(("template", f"data.template is a chat template, and data.task is {self.task}"))
        if self.learn == "last" and self.task != "chat":
            found.append(("learn", f"data.learn last is about the turns of a chat, and data.task is {self.task}"))
        return found


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """How long, how fast, in which steps."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """How often the rows are gone through; may be a fraction."""
    max_steps: Whole | None = None
    """Optimizer steps in all; if given, it counts instead of `epochs`."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The highest learning rate, reached after the warm-up."""
    tokens_per_step: Whole | None = None
    """Real tokens in one optimizer step; 8192 if `rows_per_step` is not given either."""
    rows_per_step: Whole | None = None
    """Rows in one optimizer step, instead of `tokens_per_step`."""
    micro_batch_tokens: Literal["auto"] | Whole = "auto"
    """Tokens that go through the model at once; a step is cut into as many micro-batches as that takes."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes down after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of the steps in which the learning rate rises from zero; 0.03 if `warmup_steps` is not given either."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This share of each target is spread over the whole vocabulary or all classes; the training loss contains it, evaluations do not."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """This times the squared log of the softmax's normalizer is added to the loss of each label (PaLM: 1e-4); not in evaluations."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term in the denominator."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """The order of the rows, the adapter's start and dropout follow from it."""
    eval_every: Whole | None = None
    """Evaluate every so many steps; null: after every epoch."""
    save_every: Whole | None = None
    """Save a checkpoint every so many steps; null: wherever an evaluation is due, and at the end."""
    keep_checkpoints: Whole = 2
    """How many checkpoints stay on the disk."""
    patience: Whole | None = None
    """Stop after so many evaluations without a better loss; null: never."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs byway[track])."""
    threads: Whole | None = None
    """torch's CPU threads; null: as torch chooses. Bit-exact resume needs the same number."""

    def __post_init__(self) -> None:
        if self.tokens_per_step is None and self.rows_per_step is None:
            object.__setattr__(self, "tokens_per_step", 8192)
        if self.warmup_ratio is None and self.warmup_steps is None:
            object.__setattr__(self, "warmup_ratio", 0.03)
        super().__post_init__()

    def contradictions(self) -> list[tuple[str, str]]:
        """A step has one size, a warm-up one length."""
        found: list[tuple[str, str]] = []
        if self.tokens_per_step is not None and self.rows_per_step is not None:
            why = "train.tokens_per_step and train.rows_per_step are both given; a step has one size: set one of them to null"
            found.append(("rows_per_step", why))
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            why = "train.warmup_ratio and train.warmup_steps are both given; a warm-up has one length: set one of them to null"
            found.append(("warmup_steps", why))
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.max_steps:
            why = f"train.warmup_steps is {self.warmup_steps} and train.max_steps {self.max_steps}: the warm-up would never end"
            found.append(("warmup_steps", why))
        return found


@dataclass(frozen=True, kw_only=True)
class Engine(Section):
    """What is saved because most of the model is frozen. auto: on where it reproduces the plain loss on a probe batch."""

    pack: Switch = "auto"
    """Rows side by side without padding, each seeing only itself."""
    share_prefix: Switch = "auto"
    """Run what rows of one forward begin with in common, such as a system prompt, once; auto: where that saves enough tokens."""
    labels_only: Switch = "auto"
    """Run the output head on the learnt tokens only."""
    last_layer: Switch = "auto"
    """Compute the last layer only at the positions that are read: a classifier's one token a row, tokens that predict a learnt one;
    auto: where that saves enough."""
    frontier: Switch = "auto"
    """Keep no activations below the lowest trained layer; frozen layers below it, and what feeds them, run without dropout."""
    recompute: Switch = "auto"
    """Compute norms and activation functions again in the backward pass, not keep what they gave; auto: where memory asks for it."""
    checkpointing: Switch = "auto"
    """Recompute layers in the backward pass, less memory for more time: auto as many as `memory_mb` asks for, on all that keep
    activations."""
    memory_mb: Whole | None = None
    """The memory that the run may take (a process's peak, or a GPU's), in MB; null: what the machine or its container has, less a tenth."""
    cache: Literal["off", "auto"] | Text = "off"
    """Keep what the frozen part makes of each row, for later epochs and runs: off, auto (in Byway's cache directory, where it can be kept
    and fits), or a directory (an error where it cannot be kept)."""
    cache_dtype: Literal["same", "bf16", "int8"] = "same"
    """How it is kept: exactly, or as an approximation whose error is shown."""
    cache_limit_gb: Annotated[float, Field(gt=0)] = 20.0
    """The most that may lie there, in GB; what was not used for longest, and is not in use, makes room."""
    compile: Annotated[Literal["off"], Later("on", "auto")] = "off"
    """Compile the model with torch.compile."""

    def contradictions(self) -> list[tuple[str, str]]:
        """A directory is named by its name; an approximation needs something that is kept."""
        found: list[tuple[str, str]] = []
        if self.cache in _NO_DIRECTORIES:
            why = f"engine.cache is {self.cache!r}; it must be off, auto or a directory (./{self.cache} for one of that name)"
            found.append(("cache", why))
        if self.cache == "off" and self.cache_dtype != "same":
            found.append(("cache_dtype", f"engine.cache_dtype is {self.cache_dtype}, and engine.cache is off: there is nothing to keep"))
        return found


_NO_DIRECTORIES = ("on", "yes", "no", "true", "false", "none", "null", "ON", "On", "Off", "OFF", "Auto", "AUTO")
"""What is rather meant as a switch."""
