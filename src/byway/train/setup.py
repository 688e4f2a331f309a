"""Prepare a run: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from byway.base import load_base
from byway.base.arithmetic import int8
from byway.base.arithmetic.float32 import computed
from byway.base.arithmetic.integers import multiplies_int8
from byway.core.adapter import Adapter
from byway.core.attach import attach
from byway.core.summary import frozen_parameters
from byway.engine.loss.cross_entropy import LossTerms
from byway.errors import ConfigError
from byway.formats.load import describe, load
from byway.recipe.names import adapter_names, method_name
from byway.recipe.recipe import Recipe
from byway.tasks import load as load_task
from byway.tasks.task import Rows, Task, moved
from byway.train import checkpoint, randomness
from byway.train.directory import Place, inspect
from byway.train.essentials import check_unchanged, essentials, flat
from byway.train.levers.cache import Caching, plan_cache
from byway.train.levers.choose import choose, choose_last, keys, probe_rows
from byway.train.levers.engaged import Engaged
from byway.train.levers.share_prefix import sharing_of
from byway.train.optim import Optimizer, Schedule, warmup_steps
from byway.train.order import Order
from byway.train.plan.memory import Memory, decide, recorded
from byway.train.plan.plan import Plan
from byway.train.reporting.log import check_tensorboard
from byway.train.towers import describe_towers
from byway.train.upstream import check_upstream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.core.method import Method

__all__ = ["Session", "prepare", "threads"]

_DEVICES: Mapping[str, str | None] = {"auto": None, "cpu": "cpu", "cuda": "cuda"}
_MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens of one forward pass when the recipe does not say: on a CPU more costs memory and gains no speed."""
_CALIBRATION_ROWS, _CALIBRATION_BATCHES = 8, 8
"""Calibration batches for methods that are initialized from data: the first rows."""


@dataclass
class Session:
    """A run that is ready to start."""

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
    caching: Caching
    plan: Plan
    essentials: dict[str, Any]
    saved: checkpoint.Saved | None

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return self.model.device


def prepare(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False, note: Callable[[str], None]
) -> Session:
    """Load, attach and plan; nothing is written. Sets torch's seed to the recipe's.

    With `dry_run`, the output directory may hold a run, which is only noted.

    Raises:
        ConfigError, DataError, TargetError, AdapterError: the run is impossible; the hint says what to change.
    """
    place = inspect(recipe, resume=resume, overwrite=overwrite, dry_run=dry_run)
    for text in (*recipe.notes, *place.notes):
        note(text)
    if recipe.train.tensorboard:
        check_tensorboard()
    saved = checkpoint.read(place.resume) if place.resume is not None else None
    terms = LossTerms(label_smoothing=recipe.train.label_smoothing, z_loss=recipe.train.z_loss)
    task = load_task(recipe.data.task)(recipe.data, seed=recipe.train.seed, terms=terms)
    model, tokenizer = _base(recipe, task)
    if tokenizer is not None:
        task.set_up(tokenizer)
    embeddings: Any = model.get_input_embeddings()
    rows = task.encode(tokenizer, int(embeddings.weight.shape[0]))
    for text in rows.notes:
        note(text)
    recipe = replace(recipe, data=task.resolved())
    randomness.seed(recipe.train.seed)  # initial values must not depend on what was drawn so far
    adapters = _attached(recipe, model, tokenizer, task, rows.train)
    for text in describe_towers(model, adapters, lambda: task.loss(model, moved(task.collate(rows.train[:1]), model.device))):
        note(text)
    asked = recipe.train.micro_batch_tokens
    micro_tokens = _MICRO_TOKENS.get(model.device.type, _MICRO_TOKENS["cuda"]) if asked == "auto" else asked
    with randomness.preserved():
        check_upstream(model, task.loss, moved(task.collate(probe_rows(task, rows.train)), model.device))
    with int8.exact_products(model):  # levers change the order of summation, which 8-bit rounding would amplify
        engaged, setting = choose(model, task, rows.train, recipe, micro_tokens)
    approximation = ""
    if int8.in_int8(model):
        with randomness.preserved():
            error = int8.measure(model, moved(task.collate(setting.probe.rows), model.device), task.loss)
        approximation = ", " + int8.described(error, model, slow=not multiplies_int8(model.device.type))
    lengths, packed, sharing = [task.length(e) for e in rows.train], engaged.packed, sharing_of(engaged)

    def order_of(tokens: int) -> Order:
        return Order(lengths, recipe.train, micro_tokens=tokens, pack=packed, sharing=sharing)

    taken = None if saved is None else recorded(saved.essentials, flat(recipe.to_dict()), str(saved.path))
    memory = decide(recipe, model, task, rows.train, engaged, order_of, micro_tokens, taken)
    engaged, order = memory.engaged, memory.order
    schedule = Schedule(recipe.train.schedule, warmup_steps(recipe.train, order.total), order.total)
    caching = plan_cache(
        model,
        task,
        rows,
        engaged,
        setting.probe.rows,
        recipe.engine,
        steps=(order.total, len(order.epoch(0))),
        recorded=None if saved is None else saved.essentials.get("cache", "off"),
    )
    # the worth of the last levers depends on the cache; memory is planned without them, since they only save some
    shared = 0.0 if sharing is None else sharing.saved(order.epoch(0))
    with int8.exact_products(model):
        engaged = choose_last(setting, engaged, tokens=sum(order.lengths) * (1 - shared), cached=caching.train is not None)
    levers = engaged.line(keys(recipe.engine.levers))
    cached = "" if caching.train is None else caching.line.replace("cache on", "cache", 1)
    running = ", ".join(filter(None, (engaged.on_line(), cached, approximation.removeprefix(", "))))
    digests = {"train": task.digest(rows.train)} | ({"eval": task.digest(rows.evaluation)} if rows.evaluation else {})
    own = essentials(recipe, model, tokenizer, digests, cache=caching.kept, memory=memory.choice.to_dict())
    optimizer = Optimizer(adapters, recipe.train, schedule)
    if saved is not None:
        for text in check_unchanged(saved.essentials, own, str(saved.path)):
            note(text)
        checkpoint.check_fits(saved, adapters, optimizer, order, task.criterion)
    return Session(
        recipe=recipe,
        place=place,
        task=task,
        rows=rows,
        model=model,
        tokenizer=tokenizer,
        adapters=adapters,
        order=order,
        optimizer=optimizer,
        engaged=engaged,
        caching=caching,
        plan=_plan(recipe, task, model, adapters, rows, memory, schedule, f"{levers}, {caching.line}{approximation}", running),
        essentials=own,
        saved=saved,
    )


def _base(recipe: Recipe, task: Task[Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    base = recipe.base
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("base.device is cuda, but torch sees no GPU here", "use base.device: auto or cpu")
    randomness.seed(recipe.train.seed)  # a fresh task head is drawn while loading
    options: dict[str, Any] = {"device_map": _DEVICES[base.device], "compute": base.compute, **task.base_options()}
    return load_base(base.model, base.dtype, base.quantize, add_tokens=base.add_tokens, **options)


def _attached(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, task: Task[Any], examples: Sequence[Any]
) -> tuple[Adapter, ...]:
    """Attach each method, under the name it is saved by."""
    chosen = examples[: _CALIBRATION_ROWS * _CALIBRATION_BATCHES]
    rows = [chosen[i : i + _CALIBRATION_ROWS] for i in range(0, len(chosen), _CALIBRATION_ROWS)]
    # with labels: a method that wants none drops them
    batches = [moved(task.collate(some), model.device) for some in rows]
    methods = _with_new_tokens(recipe, model, tokenizer)
    adapters: list[Adapter] = []
    for method, start, name in zip(methods, recipe.start, adapter_names(recipe.method), strict=True):
        if start is None:
            adapters.append(attach(model, method, name, tokenizer=tokenizer, batches=batches))
        else:
            kinds = (type(method),)
            before = describe(start, kinds)
            changed = {f.name: value for f in fields(method) if (value := getattr(method, f.name)) != getattr(before, f.name)}
            adapters.append(load(model, start, name, trainable=True, methods=kinds, tokenizer=tokenizer, fields=changed))
    return tuple(adapters)


def _with_new_tokens(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Method, ...]:
    """Return the recipe's methods, the first that can of which also trains the rows of ``base.add_tokens``."""
    if not recipe.base.add_tokens or tokenizer is None:
        return recipe.method
    there = tokenizer.get_vocab()
    ids = [there[token] for token in recipe.base.add_tokens]
    for i, method in enumerate(recipe.method):
        trains = method.with_token_rows(model, ids)
        if trains is not None:
            return (*recipe.method[:i], trains, *recipe.method[i + 1 :])
    names = ", ".join(method_name(type(method)) for method in recipe.method)
    raise ConfigError(f"base.add_tokens needs a method that trains the rows of new tokens; {names} does not", "use lora, dora or full")


def _plan(
    recipe: Recipe,
    task: Task[Any],
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    rows: Rows[Any],
    memory: Memory,
    schedule: Schedule,
    levers: str,
    running: str,
) -> Plan:
    order = memory.order
    trained = sum(adapter.num_parameters for adapter in adapters)
    quantized = f", {recipe.base.quantize}" if recipe.base.quantize else ""
    how = {"fp32": ", computed in float32", "int8": ", int8 products"}.get(computed(model), "")
    return Plan(
        trained=trained,
        frozen=frozen_parameters(model),
        rows=len(rows.train),
        tokens=sum(order.lengths),
        labels=sum(map(task.labels, rows.train)),
        eval_rows=len(rows.evaluation),
        steps=order.total,
        steps_per_epoch=len(order.epoch(0)),
        micro_tokens=order.micro_tokens,
        warmup=schedule.warmup,
        levers=levers,
        engine=running,
        memory_mb=memory.megabytes,
        memory_note=memory.note,
        base=f"{recipe.base.model} ({str(model.dtype).removeprefix('torch.')}{quantized}{how}, {model.device})",
        output=recipe.output,
        criterion=task.criterion,
        details=tuple(f"{name}: {line}" for name, each in rows.reports.items() for line in each.lines()),
        summary="\n".join(adapter.summary() for adapter in adapters),
    )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within this context torch uses `count` threads (None: unchanged); on exit, restore them and random generators."""
    before = torch.get_num_threads()
    with randomness.preserved():
        if count is not None:
            torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
