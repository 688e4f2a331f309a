"""How much memory a run will need, measured on small batches, and which layers are recomputed and how steps are cut so that it fits.

One forward and backward of up to three small batches; the bytes alive are counted in three phases and each is fitted by

    a + b·(tokens) + c·Σ(length²)      c: attention that keeps its scores

the forward, the loss (with the logits, of which only a chunk may be held at a time), and the backward, which includes one layer's
recomputation and its gradients. The peak of the process is what it holds now, the gradients, AdamW's moments, and the largest phase at the
largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.engine.checkpointing import recomputable
from byway.engine.cross_entropy import chunk_rows
from byway.engine.live import live
from byway.engine.loss import unchunked
from byway.errors import ConfigError, TargetError
from byway.families import facts
from byway.tasks import Task
from byway.train import randomness
from byway.train.levers import Engaged
from byway.train.mode import training_mode
from byway.train.order import Order
from byway.train.plan import available_bytes, held_bytes, high_water_bytes, trim
from byway.weights import features

if TYPE_CHECKING:
    from byway.recipe import Recipe

__all__ = ["Choice", "Memory", "decide", "recorded"]

EXACT = 512
"""A largest micro-batch of at most so many tokens is measured itself."""
PROBE = 384
"""Tokens of the larger probes."""
FEWEST = 128
"""Tokens below which micro-batches are not cut to save memory."""
MEGABYTE = 2**20
LOOSE = {"cpu": 2.0, "cuda": 1.1}
"""Bytes taken from the system for each byte alive: what is freed in between is not always fit to be used again. On a CPU 1.8 to 2.5 were
measured with the C library's allocator as it is (glibc 2.36, batches of changing size)."""
MARGIN = 0.1
"""The share of the memory that can be had which is left alone."""
_ASKED = ("engine.checkpointing", "engine.memory_mb", "train.micro_batch_tokens")


@dataclass(frozen=True)
class Choice:
    """What was decided from measured bytes; a resumed run takes the recorded one, so that it is the same run."""

    layers: tuple[str, ...]
    """Recomputed in the backward pass."""
    micro_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As it is written into checkpoints."""
        return {"layers": list(self.layers), "micro_tokens": self.micro_tokens}


@dataclass(frozen=True)
class Memory:
    """The decision and what it is expected to need."""

    choice: Choice
    engaged: Engaged
    order: Order
    megabytes: int
    note: str = ""
    """That it will not fit, where it will not."""


def recorded(saved: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> Choice | None:
    """The choice in a checkpoint's essentials, if the flat `recipe` asks for the same as the checkpoint's did."""
    if saved is None or "memory" not in saved or any(saved["recipe"].get(key) != recipe.get(key) for key in _ASKED):
        return None
    return Choice(tuple(saved["memory"]["layers"]), saved["memory"]["micro_tokens"])


def decide(
    recipe: Recipe,
    model: nn.Module,
    task: Task[Any],
    examples: Sequence[Any],
    engaged: Engaged,
    order: Callable[[int], Order],
    micro_tokens: int,
    taken: Choice | None,
) -> Memory:
    """Which layers to recompute and how to cut steps: as little of both as the budget asks for, first the one, then the other.

    Args:
        order: micro-batch tokens → the run's order.
        micro_tokens: what it is unless memory asks for less.
        taken: a recorded choice, which is not made again.

    Raises:
        ConfigError: ``engine.checkpointing`` is on, and there is nothing to recompute.
    """
    wish, why_not, layers = recipe.engine.checkpointing, "", ()
    try:
        layers = recomputable(model)
        why_not = "" if layers else "no layer keeps activations: what is trained reads the last one's output"
    except TargetError as error:
        why_not = error.message
    if wish == "on" and why_not:
        raise ConfigError(f"engine.checkpointing is on, but {why_not}", "set engine.checkpointing: auto or off")
    planner = _Planner(recipe, model, task, examples, engaged, order)
    if taken is not None and set(taken.layers) <= set(layers):
        return planner.memory(taken.layers, taken.micro_tokens, "as in the checkpoint")
    if wish == "on":
        return planner.within(layers, micro_tokens, "")
    first = planner.memory((), micro_tokens, "not needed")
    if planner.fits(first):
        return first
    if wish == "off" or not layers:
        return planner.within((), micro_tokens, why_not or "switched off")
    why = f"without it about {first.megabytes:,} MB"
    few = planner.fewest(layers, micro_tokens)
    if few:
        found = planner.memory(few, micro_tokens, why)
        if planner.fits(found):
            return found
    return planner.within(layers, micro_tokens, why)


@dataclass(frozen=True)
class _Shape:
    """What the memory of one micro-batch depends on."""

    cells: int
    squares: int
    labels: int


@dataclass(frozen=True)
class _Phases:
    """Bytes alive in one forward and backward."""

    forward: int
    """At most, before the loss."""
    kept: int
    """When the trunk is done."""
    loss: int
    """At most beside these, until the gradient is back at the trunk."""
    backward: int
    """At most after that."""


class _Planner:
    """Measurements of one run, each made once."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, order: Callable[[int], Order]
    ) -> None:
        self.model, self.task, self.examples, self.engaged, self.order_of = model, task, examples, engaged, order
        self.device = next(model.parameters()).device
        trim()
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.held = held_bytes(model, self.device)
        self.static = self.held + 3 * trained  # gradients and AdamW's moments
        self.updating = self.static + 2 * trained
        """While AdamW steps, with its temporaries."""
        self.asked = recipe.engine.memory_mb
        available = available_bytes(self.device)
        machine = None if available is None else self.held + int((1 - MARGIN) * available)
        self.budget = machine if self.asked is None else self.asked * MEGABYTE
        self.may_cut = recipe.train.micro_batch_tokens == "auto"
        self.models: dict[tuple[str, ...], _Model] = {}

    def fits(self, memory: Memory) -> bool:
        return self.budget is None or memory.megabytes * MEGABYTE <= self.budget

    def memory(self, layers: Sequence[str], micro_tokens: int, why: str) -> Memory:
        """What the run needs with `layers` recomputed and steps cut to `micro_tokens`."""
        order = self.order_of(micro_tokens)
        engaged = self.engaged.with_checkpointing(tuple(layers), why)
        alive = self.model_of(engaged, order).most(self.shapes(order))
        peak = max(self.static + int(alive * LOOSE.get(self.device.type, LOOSE["cuda"])), self.updating)
        megabytes = max(peak, high_water_bytes(self.device)) // MEGABYTE
        found = Memory(Choice(tuple(layers), micro_tokens), engaged, order, megabytes)
        if self.budget is None or self.fits(found):
            return found
        limit = f"engine.memory_mb: {self.asked}" if self.asked is not None else f"the {self.budget // MEGABYTE:,} MB there are"
        return replace(found, note=f"more than {limit}")

    def within(self, layers: Sequence[str], micro_tokens: int, why: str) -> Memory:
        """The same, with steps cut smaller until it fits, where the recipe leaves that open; else as it is."""
        found = first = self.memory(layers, micro_tokens, why)
        while self.may_cut and not self.fits(found) and found.choice.micro_tokens > FEWEST:
            found = self.memory(layers, max(found.choice.micro_tokens // 2, FEWEST), why)
        return found if found.megabytes < first.megabytes else first

    def fewest(self, layers: Sequence[str], micro_tokens: int) -> tuple[str, ...]:
        """The lowest layers that suffice if each saves its share: what is recomputed late in the backward pass adds nothing to its peak."""
        none, every = (self.memory(chosen, micro_tokens, "").megabytes for chosen in ((), layers))
        if self.budget is None or none <= every or every * MEGABYTE > self.budget:
            return ()
        share = (none - self.budget // MEGABYTE) / (none - every)
        return tuple(layers[: min(int(share * len(layers)) + 1, len(layers))])

    def model_of(self, engaged: Engaged, order: Order) -> _Model:
        if engaged.checkpointed not in self.models:
            self.models[engaged.checkpointed] = _Model(self.model, self.task, engaged, self.batches(order))
        return self.models[engaged.checkpointed]

    def shapes(self, order: Order) -> list[_Shape]:
        return [self.shape([self.examples[i] for i in micro]) for step in order.epoch(0) for micro in step]

    def shape(self, examples: Sequence[Any]) -> _Shape:
        lengths = [self.task.length(e) for e in examples]
        if not self.engaged.levers.pack:
            lengths = [max(lengths)] * len(lengths)
        tokens = sum(lengths) if self.engaged.sharing is None else self.engaged.tokens(self.task, examples)
        return _Shape(tokens, sum(n * n for n in lengths), sum(map(self.task.labels, examples)))

    def batches(self, order: Order) -> list[tuple[_Shape, dict[str, Any]]]:
        """What is measured: the largest micro-batch if it is small, else a few small ones of different shapes."""
        micros = [[self.examples[i] for i in micro] for step in order.epoch(0) for micro in step]
        largest = max(micros, key=lambda micro: self.shape(micro).cells)
        if self.shape(largest).cells <= EXACT:
            return [self.collated(largest)]
        rows = sorted((e for e in self.examples if self.task.labels(e) > 0), key=self.task.length)
        if not rows or self.task.length(rows[0]) > PROBE:
            shape, batch = self.collated(rows[:1] or largest)
            return [_cut(batch, length) for length in (PROBE // 3, 2 * PROBE // 3, PROBE)] if "input_ids" in batch else [(shape, batch)]
        fitting = [row for row in rows if self.task.length(row) <= PROBE]
        # not too small: side paths keep less of large batches (dropout masks that are drawn again)
        picked = (_filled(fitting, self.task, PROBE // 2), _filled(fitting[::-1], self.task, PROBE), _filled(fitting, self.task, PROBE))
        return [self.collated(each) for each in picked]

    def collated(self, examples: Sequence[Any]) -> tuple[_Shape, dict[str, Any]]:
        return self.shape(examples), self.engaged.batch(self.task, examples, self.device)


def _filled(rows: Sequence[Any], task: Task[Any], room: int) -> list[Any]:
    """Rows from the first on, as many as have `room` tokens together; at least one."""
    chosen: list[Any] = []
    for row in rows:
        if chosen and task.length(row) > room:
            break
        chosen.append(row)
        room -= task.length(row)
    return chosen


def _cut(batch: Mapping[str, Any], length: int) -> tuple[_Shape, dict[str, Any]]:
    """The last tokens of a batch of one row, at the first positions."""
    ids: Tensor = batch["input_ids"]
    cut = dict(batch)
    for key, value in batch.items():
        if key.startswith(("cu_seq_lens", "max_length")):
            cut[key] = value.clamp(max=length) if isinstance(value, Tensor) else min(value, length)
        elif isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            cut[key] = value[:, :length] if key == "position_ids" else value[:, -length:]
    labels = cut.get("labels")
    count = int((labels != -100).sum()) if isinstance(labels, Tensor) else 0
    return _Shape(length, length * length, count), cut


class _Model:
    """Bytes as a function of a micro-batch's shape."""

    def __init__(self, model: nn.Module, task: Task[Any], engaged: Engaged, batches: Sequence[tuple[_Shape, dict[str, Any]]]) -> None:
        shapes = [shape for shape, _ in batches]
        found = [measured(model, task, engaged, batch) for _, batch in batches]
        # packed documents have no mask over pairs of tokens, and sdpa keeps no scores
        config: Any = model.config
        pairs = not (engaged.levers.pack and str(config._attn_implementation).endswith("sdpa"))
        self.forward = _fit(shapes, [one.forward for one in found], pairs=pairs)
        self.kept = _fit(shapes, [one.kept for one in found], pairs=pairs)
        self.backward = _fit(shapes, [one.backward for one in found], pairs=pairs)
        self.loss = _loss_fit(model, task, engaged, shapes, [one.loss for one in found])

    def most(self, shapes: Sequence[_Shape]) -> int:
        """Over all micro-batches."""
        return int(max(max(self.forward(s), self.kept(s) + self.loss(s), self.backward(s)) for s in shapes))


def measured(model: nn.Module, task: Task[Any], engaged: Engaged, batch: Mapping[str, Any]) -> _Phases:
    """Bytes alive in one forward and backward of `batch`; the model, its modes and the random stream are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    fresh = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    try:
        training_mode(model)
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but the first of a step
        with randomness.preserved(), engaged.engaged(model), live(model, batch) as count:
            marks: list[int] = []

            def trunk_done(module: nn.Module, args: Any, out: Any) -> None:
                hidden = out if isinstance(out, Tensor) else out[0]
                if not marks:
                    marks.extend((count.peak(), count.now()))
                    if isinstance(hidden, Tensor) and hidden.requires_grad:
                        hidden.register_hook(lambda _: marks.append(count.peak()))

            found = facts(model)
            paths = [found.trunk] if found.trunk is not None else list(found.stack_modules.values())[-1:]
            handles = [model.get_submodule(path).register_forward_hook(trunk_done) for path in paths]
            try:
                loss, labels = task.loss(model, batch, labels_only=engaged.levers.labels_only)
                (loss / max(labels, 1)).backward()
            finally:
                for handle in handles:
                    handle.remove()
            last = count.peak()
            del loss
    finally:
        for parameter in fresh:
            parameter.grad = None
        for module, training in modes:
            module.training = training
    if len(marks) < 2:
        return _Phases(last, 0, 0, 0)
    at_loss = marks[2] if len(marks) > 2 else last
    return _Phases(marks[0], marks[1], at_loss - marks[1], last if len(marks) > 2 else 0)


_Curve = Callable[[_Shape], float]


def _fit(
    shapes: Sequence[_Shape], values: Sequence[int], of: Callable[[_Shape], float] = lambda shape: shape.cells, *, pairs: bool = False
) -> _Curve:
    """a + b·of(shape) + c·squares (`pairs`) through the points, by least squares; without c, then a, where they would not be ≥ 0."""
    y = torch.tensor(values, dtype=torch.float64)
    forms = (lambda s: (1.0, of(s), float(s.squares)), lambda s: (1.0, of(s)), lambda s: (of(s),))
    for columns in forms[0 if pairs else 1 :]:
        rows = torch.tensor([columns(s) for s in shapes], dtype=torch.float64)
        scale = rows.abs().amax(0).clamp(min=1e-30)
        if len(shapes) < rows.shape[1] or int(torch.linalg.matrix_rank(rows / scale, rtol=1e-3)) < rows.shape[1]:
            continue
        solution = torch.linalg.lstsq(rows / scale, y[:, None]).solution[:, 0] / scale
        slack = -1e-3 * float(y.abs().max())
        if all(float(x * s) >= slack for x, s in zip(solution[-2:], scale[-2:], strict=False)) or rows.shape[1] == 1:
            weights = solution.tolist()
            return lambda shape, columns=columns: sum(w * x for w, x in zip(weights, columns(shape), strict=True))
    return lambda shape: float(max(values))


def _loss_fit(model: nn.Module, task: Task[Any], engaged: Engaged, shapes: Sequence[_Shape], values: Sequence[int]) -> _Curve:
    """The loss's bytes: by labels where only these have logits, and those beyond one chunk of them add only their hidden states."""
    if not (engaged.levers.labels_only and task.language_model):
        return _fit(shapes, values)
    head = facts(model).head
    if unchunked(model) or head is None:
        return _fit(shapes, values, lambda shape: shape.labels)
    width, vocabulary = features(model.get_submodule(head))
    device = next(model.parameters()).device
    rows = chunk_rows(vocabulary, device)
    rest = 8.0 * width  # a row of hidden states and its gradient

    def chunk(shape: _Shape) -> float:
        return min(shape.labels, rows)

    net = [value - rest * shape.labels for shape, value in zip(shapes, values, strict=True)]
    per_row = max((n / max(chunk(s), 1) for s, n in zip(shapes, net, strict=True) if s is max(shapes, key=chunk)), default=0.0)
    return lambda shape: rest * shape.labels + per_row * chunk(shape)
