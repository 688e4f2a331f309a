"""Everything that can be refused is refused here, before anything is written: recipe, paths, rows, base, method, plan, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from byway.base import load_base
from byway.core import Adapter, attach
from byway.errors import ConfigError
from byway.recipe import Recipe, adapter_names
from byway.tasks import Rows, Task, moved
from byway.tasks import load as load_task
from byway.train import checkpoint, randomness
from byway.train.directory import Place, inspect
from byway.train.essentials import check_unchanged, essentials
from byway.train.levers import Engaged, can_checkpoint, choose, saved_bytes
from byway.train.log import check_tensorboard
from byway.train.optim import Optimizer, Schedule, warmup_steps
from byway.train.order import Order
from byway.train.plan import Plan, available_bytes, static_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Session", "prepare", "threads"]

_DEVICES: Mapping[str, str | None] = {"auto": None, "cpu": "cpu", "cuda": "cuda"}
_MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward when the recipe leaves it open: on a CPU more gains nothing (only memory)."""
_CALIBRATION_ROWS, _CALIBRATION_BATCHES = 8, 8
"""What a method that starts from data is shown: the first rows, as batches."""


@dataclass
class Session:
    """A run that is ready to begin."""

    recipe: Recipe
    place: Place
    task: Task[Any]
    rows: Rows[Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    adapters: tuple[Adapter, ...]
    order: Order
    optimizer: Optimizer
    engaged: Engaged
    plan: Plan
    essentials: dict[str, Any]
    saved: checkpoint.Saved | None

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.device


def prepare(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, note: Callable[[str], None]) -> Session:
    """Load, attach and plan; nothing is written. torch's seed is set to the recipe's.

    Raises:
        ConfigError, DataError, TargetError, AdapterError: what cannot be done, and what to do about it.
    """
    place = inspect(recipe, resume=resume, overwrite=overwrite)
    for text in (*recipe.notes, *place.notes):
        note(text)
    if recipe.train.tensorboard:
        check_tensorboard()
    saved = checkpoint.read(place.resume) if place.resume is not None else None
    task = load_task(recipe.data.task)(recipe.data, seed=recipe.train.seed)
    base = recipe.base
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("base.device is cuda, but torch sees no GPU here", "use base.device: auto or cpu")
    randomness.seed(recipe.train.seed)  # a fresh task head is drawn while loading
    model, tokenizer = load_base(base.model, base.dtype, base.quantize, device_map=_DEVICES[base.device], **task.base_options())
    embeddings: Any = model.get_input_embeddings()
    rows = task.encode(tokenizer, int(embeddings.weight.shape[0]))
    for text in rows.notes:
        note(text)
    recipe = replace(recipe, data=task.resolved())
    randomness.seed(recipe.train.seed)  # a method's start must not depend on what was drawn so far
    adapters = _attached(recipe, model, tokenizer, task, rows.train)
    engaged, probe = choose(model, task, rows.train, recipe.engine)
    order = _order(recipe, task, rows.train, engaged, model.device)
    schedule = Schedule(recipe.train.schedule, warmup_steps(recipe.train, order.total), order.total)
    engaged, memory = _memory(recipe, model, task, probe, engaged, order)
    digests = {"train": task.digest(rows.train)} | ({"eval": task.digest(rows.evaluation)} if rows.evaluation else {})
    own = essentials(recipe, model, tokenizer, digests)
    if saved is not None:
        for text in check_unchanged(saved.essentials, own, str(saved.path)):
            note(text)
    return Session(
        recipe=recipe,
        place=place,
        task=task,
        rows=rows,
        model=model,
        tokenizer=tokenizer,
        adapters=adapters,
        order=order,
        optimizer=Optimizer(adapters, recipe.train, schedule),
        engaged=engaged,
        plan=_plan(recipe, task, model, adapters, rows, order, schedule, engaged, memory),
        essentials=own,
        saved=saved,
    )


def _attached(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, task: Task[Any], examples: Sequence[Any]
) -> tuple[Adapter, ...]:
    """One attach for each method, by the names under which they are saved."""
    chosen = examples[: _CALIBRATION_ROWS * _CALIBRATION_BATCHES]
    rows = [chosen[i : i + _CALIBRATION_ROWS] for i in range(0, len(chosen), _CALIBRATION_ROWS)]
    batches = [moved(task.collate(some), model.device) for some in rows]  # with their labels: a method that wants none leaves them out
    names = adapter_names(recipe.method)
    return tuple(
        attach(model, method, name, tokenizer=tokenizer, batches=batches) for method, name in zip(recipe.method, names, strict=True)
    )


def _order(recipe: Recipe, task: Task[Any], examples: Sequence[Any], engaged: Engaged, device: torch.device) -> Order:
    asked = recipe.train.micro_batch_tokens
    micro = _MICRO_TOKENS.get(device.type, _MICRO_TOKENS["cuda"]) if asked == "auto" else asked
    return Order([task.length(e) for e in examples], recipe.train, micro_tokens=micro, pack=engaged.levers.pack)


def _memory(
    recipe: Recipe, model: PreTrainedModel, task: Task[Any], probe: Sequence[Any], engaged: Engaged, order: Order
) -> tuple[Engaged, int]:
    """(levers with checkpointing decided, estimated MB): activations measured on the probe, scaled to the largest micro-batch."""
    largest = max(sum(order.lengths[i] for i in micro) for step in order.epoch(0) for micro in step)
    tokens = sum(map(task.length, probe))
    batch = moved(task.collate(probe, packed=engaged.levers.pack), model.device)

    def activations_with(choice: Engaged) -> int:
        model.train()
        with choice.engaged(model):
            kept = saved_bytes(model, task, batch, labels_only=choice.levers.labels_only)
        model.eval()
        return kept * max(largest, tokens) // max(tokens, 1)

    wish, why_not = recipe.engine.checkpointing, can_checkpoint(model)
    if wish == "on" and why_not:
        raise ConfigError(f"engine.checkpointing is on, but {why_not}", "set engine.checkpointing: auto or off")
    static, activations = static_bytes(model, model.device), activations_with(engaged)
    available = available_bytes(model.device)
    tight = available is not None and activations > 0.8 * available
    if wish == "on" or (wish == "auto" and tight and not why_not):
        engaged = engaged.with_checkpointing(True, "" if wish == "on" else f"without it about {static + activations >> 20:,} MB")
        return engaged, static + activations_with(engaged) >> 20
    reason = "switched off" if wish == "off" else why_not if tight else "not needed"
    return engaged.with_checkpointing(False, reason), static + activations >> 20


def _plan(
    recipe: Recipe,
    task: Task[Any],
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    rows: Rows[Any],
    order: Order,
    schedule: Schedule,
    engaged: Engaged,
    memory_mb: int,
) -> Plan:
    trained = sum(adapter.num_parameters for adapter in adapters)
    quantized = f", {recipe.base.quantize}" if recipe.base.quantize else ""
    return Plan(
        trained=trained,
        frozen=model.num_parameters() - trained,
        rows=len(rows.train),
        tokens=sum(order.lengths),
        labels=sum(map(task.labels, rows.train)),
        eval_rows=len(rows.evaluation),
        steps=order.total,
        steps_per_epoch=len(order.epoch(0)),
        micro_tokens=order.micro_tokens,
        warmup=schedule.warmup,
        levers=engaged.line(),
        memory_mb=memory_mb,
        base=f"{recipe.base.model} ({str(model.dtype).removeprefix('torch.')}{quantized}, {model.device})",
        output=recipe.output,
        criterion=task.criterion,
        details=tuple(f"{name}: {line}" for name, each in rows.reports.items() for line in each.lines()),
        summary="\n".join(adapter.summary() for adapter in adapters),
    )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within this context torch uses `count` threads (None: as it is); afterwards these and every generator are as they were."""
    before = torch.get_num_threads()
    with randomness.preserved():
        if count is not None:
            torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
