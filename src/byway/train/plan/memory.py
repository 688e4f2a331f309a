"""How much memory a run will need, measured on small batches, and which layers are recomputed and how steps are cut so that it fits.

One forward and backward of two or three small batches of pieces of the rows; the bytes alive are counted in three phases and each is
fitted by

    a + b·(tokens) + c·Σ(length²) + d·(keys)      c: attention that keeps its scores;  d: keys of rows that take over a common head

the forward, the loss (with the logits, of which only a chunk may be held at a time), and the backward, which includes one layer's
recomputation and its gradients. The peak of the process is what it holds now, the gradients, AdamW's moments, and the largest phase at the
largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.weights import features
from byway.engine.backward.checkpointing import recomputable
from byway.engine.backward.recompute import SMALLEST
from byway.engine.loss.cross_entropy import chunk_rows
from byway.engine.loss.tokens import unchunked
from byway.engine.shared_prefix import Sharing
from byway.errors import ConfigError, TargetError
from byway.tasks.task import Task
from byway.train import randomness
from byway.train.levers.engaged import Engaged
from byway.train.mode import training_mode
from byway.train.order import Order
from byway.train.plan.live import live
from byway.train.plan.machine import available_bytes, held_bytes, high_water_bytes, trim

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["Choice", "Memory", "decide", "recorded"]

EXACT = 160
"""A largest micro-batch of at most so many tokens is measured itself."""
PROBES = ((1, 32), (3, 32), (2, 64))
"""(rows, tokens of each) of the batches that are measured otherwise; the last one only where a length's square tells something."""
SHARED = (3, 32)
"""The same of one in which common heads are computed once."""
FEWEST = 128
"""Tokens below which micro-batches are not cut to save memory."""
MEGABYTE = 2**20
LOOSE = {"cpu": 2.0, "cuda": 1.1}
"""Bytes taken from the system for each byte alive: what is freed in between is not always fit to be used again. On a CPU 1.8 to 2.5 were
measured with the C library's allocator as it is (glibc 2.36, batches of changing size)."""
MARGIN = 0.1
"""The share of the memory that can be had which is left alone."""
_ASKED = ("engine.checkpointing", "engine.memory_mb", "engine.recompute", "train.micro_batch_tokens")


@dataclass(frozen=True)
class Choice:
    """What was decided from measured bytes; a resumed run takes the recorded one, so that it is the same run."""

    layers: tuple[str, ...]
    """Recomputed in the backward pass."""
    micro_tokens: int
    recompute: bool
    """Whether cheap activations are computed again."""

    def to_dict(self) -> dict[str, Any]:
        """As it is written into checkpoints."""
        return {"layers": list(self.layers), "micro_tokens": self.micro_tokens, "recompute": self.recompute}


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
    return Choice(tuple(saved["memory"]["layers"]), saved["memory"]["micro_tokens"], saved["memory"]["recompute"])


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
    """What to compute again and how to cut steps, as little as the budget asks for: cheap activations, then layers, then smaller batches.

    Args:
        engaged: its ``recompute`` is on if it may be.
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
    if taken is not None and set(taken.layers) <= set(layers):
        engaged = engaged if taken.recompute else engaged.keeping_all("as in the checkpoint")
        return _Planner(recipe, model, task, examples, engaged, order).memory(taken.layers, taken.micro_tokens, "as in the checkpoint")
    if wish != "on" and engaged.levers.recompute and recipe.engine.recompute == "auto":
        planner = _Planner(recipe, model, task, examples, engaged.keeping_all("not needed"), order)
        found = planner.memory((), micro_tokens, "not needed")
        if planner.fits(found):
            return found
    planner = _Planner(recipe, model, task, examples, engaged, order)
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
    copied: int = 0
    """Keys of the rows that take over a head: they are put together from the head's and their own."""


@dataclass(frozen=True)
class _Sample:
    """A batch that is measured."""

    shape: _Shape
    batch: dict[str, Any]
    smallest: int
    """Tensors with fewer numbers are not recomputed: those that would not be in a batch of the size that it stands for."""


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
        config: Any = model.config
        self.pairs = not (engaged.levers.pack and str(config._attn_implementation).endswith("sdpa"))
        """Whether memory grows with squares of lengths: packed documents have no mask over pairs of tokens, and sdpa keeps no scores."""
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
        found = Memory(Choice(tuple(layers), micro_tokens, engaged.levers.recompute), engaged, order, megabytes)
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
            self.models[engaged.checkpointed] = _Model(self.model, self.task, engaged, self.batches(order), pairs=self.pairs)
        return self.models[engaged.checkpointed]

    def shapes(self, order: Order) -> list[_Shape]:
        return [self.shape([self.examples[i] for i in micro]) for step in order.epoch(0) for micro in step]

    def shape(self, examples: Sequence[Any], engaged: Engaged | None = None) -> _Shape:
        engaged = engaged or self.engaged
        lengths = [self.task.length(e) for e in examples]
        if not engaged.levers.pack:
            lengths = [max(lengths)] * len(lengths)
        tokens, copied = sum(lengths), 0
        if engaged.sharing is not None:
            parts = Sharing(examples).layout(range(len(examples)))
            tokens, copied = sum(part.end - part.begin for part in parts), sum(part.end for part in parts if part.begin)
        return _Shape(tokens, sum(n * n for n in lengths), sum(map(self.task.labels, examples)), copied)

    def batches(self, order: Order) -> list[_Sample]:
        """What is measured: the largest micro-batch if it is small, else a few small ones of pieces of rows."""
        micros = [[self.examples[i] for i in micro] for step in order.epoch(0) for micro in step]
        largest = max(micros, key=lambda micro: self.shape(micro).cells)
        cells = self.shape(largest).cells
        if cells <= EXACT:
            return [self.sample(largest, cells, self.engaged)]
        labelled = [e for e in self.examples if self.task.labels(e) > 0] or list(self.examples)
        longest = sorted(labelled, key=self.task.length, reverse=True)
        alone = self.engaged.with_sharing(None, "")
        sizes = PROBES if self.pairs else PROBES[:2]
        found = [self.sample(_pieces(longest, self.task, count, tokens), cells, alone) for count, tokens in sizes]
        if self.engaged.sharing is not None:
            found.append(self.sample(_pieces(longest, self.task, *SHARED), cells, self.engaged))
        return found

    def sample(self, examples: Sequence[Any], cells: int, engaged: Engaged) -> _Sample:
        """A batch that stands for one of `cells` tokens."""
        shape = self.shape(examples, engaged)
        return _Sample(shape, engaged.batch(self.task, examples, self.device), SMALLEST * shape.cells // cells)


def _pieces(rows: Sequence[Any], task: Task[Any], count: int, tokens: int) -> list[Any]:
    """Pieces of at most `tokens` tokens of the first rows, over again where there are too few: `count`, or more where rows are shorter."""
    found, room = list[Any](), count * tokens
    for row in cycle(rows):
        if room < tokens:
            break
        found.append(task.cut(row, tokens))
        room -= task.length(found[-1])
    return found


class _Model:
    """Bytes as a function of a micro-batch's shape."""

    def __init__(self, model: nn.Module, task: Task[Any], engaged: Engaged, samples: Sequence[_Sample], *, pairs: bool) -> None:
        shapes = [sample.shape for sample in samples]
        found = [measured(model, task, engaged, sample.batch, smallest=sample.smallest) for sample in samples]
        self.forward = _with_copies(shapes, [one.forward for one in found], pairs=pairs)
        self.kept = _with_copies(shapes, [one.kept for one in found], pairs=pairs)
        self.backward = _with_copies(shapes, [one.backward for one in found], pairs=pairs)
        self.loss = _loss_fit(model, task, engaged, shapes, [one.loss for one in found])

    def most(self, shapes: Sequence[_Shape]) -> int:
        """Over all micro-batches."""
        return int(max(max(self.forward(s), self.kept(s) + self.loss(s), self.backward(s)) for s in shapes))


def measured(model: nn.Module, task: Task[Any], engaged: Engaged, batch: Mapping[str, Any], *, smallest: int = SMALLEST) -> _Phases:
    """Bytes alive in one forward and backward of `batch`; the model, its modes and the random stream are as before afterwards.

    `smallest`: of the tensors that are recomputed (:data:`byway.engine.backward.recompute.SMALLEST`).
    """
    modes = [(module, module.training) for module in model.modules()]
    fresh = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    try:
        training_mode(model)
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but the first of a step
        with randomness.preserved(), engaged.engaged(model, smallest=smallest), live(model, batch) as count:
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


def _with_copies(shapes: Sequence[_Shape], values: Sequence[int], *, pairs: bool) -> _Curve:
    """:func:`_fit` of what shares nothing, and so many bytes for each key that is copied as the rest of the points says."""
    alone = [place for place, shape in enumerate(shapes) if not shape.copied]
    if not alone or len(alone) == len(shapes):
        return _fit(shapes, values, pairs=pairs)
    curve = _fit([shapes[place] for place in alone], [values[place] for place in alone], pairs=pairs)
    rest = [(value - curve(shape)) / shape.copied for shape, value in zip(shapes, values, strict=True) if shape.copied]
    each = max(sum(rest) / len(rest), 0.0)
    return lambda shape: curve(shape) + each * shape.copied


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
