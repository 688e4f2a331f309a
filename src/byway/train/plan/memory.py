"""Plan the memory of a run from small measured batches: which layers to recompute, how to split steps so that it fits.

Two or three small batches of pieces of the rows run forward and backward once. The live bytes of three phases are
counted, and each phase is fitted by

    a + b·(tokens) + c·Σ(length²) + d·(keys)    c: attention that keeps scores;  d: keys of rows reusing a shared prefix

The phases: the forward pass; the loss, with logits of which only a chunk may exist at a time; the backward pass, which
includes the recomputation of one layer and its gradients. The peak of the process is what it holds now, plus gradients,
AdamW's moments, and the largest phase at the largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.fields import Count, from_json
from byway.core.modes import modes_restored
from byway.core.weights import features
from byway.engine.backward.checkpointing import recomputable
from byway.engine.backward.recompute import SMALLEST
from byway.engine.loss.cross_entropy import chunk_rows
from byway.engine.loss.tokens import unchunked
from byway.engine.shared_prefix import Sharing
from byway.errors import ConfigError, TargetError
from byway.tasks.task import Task
from byway.train import randomness
from byway.train.levers.checkpointing import Checkpointing, layers_of
from byway.train.levers.choose import probe_rows
from byway.train.levers.engaged import Engaged
from byway.train.levers.prove import repeats
from byway.train.levers.recompute import Recompute
from byway.train.levers.share_prefix import SharePrefix, sharing_of
from byway.train.mode import training_mode
from byway.train.order import Order
from byway.train.plan.live import live
from byway.train.plan.machine import available_bytes, held_bytes, high_water_bytes, trim

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe

__all__ = ["Choice", "Memory", "decide", "recorded"]

EXACT = 160
"""If the largest micro-batch has at most this many tokens, it is measured itself."""
PROBES = ((1, 32), (3, 32), (2, 64))
"""Otherwise these (rows, tokens of each) are measured; the last only if memory depends on squared lengths."""
SHARED = (3, 32)
"""The same, for a batch in which shared prefixes are computed once."""
FEWEST = 128
"""Micro-batches are not split below this many tokens to save memory."""
MEGABYTE = 2**20
LOOSE = {"cpu": 2.0, "cuda": 1.1}
"""Bytes taken from the system per live byte, because the allocator does not reuse all freed memory. On a CPU 1.8 to 2.5
were measured with glibc 2.36's default allocator and batches of changing size."""
MARGIN = 0.1
"""The share of available memory that is left unused."""
_ASKED = ("engine.checkpointing", "engine.memory_mb", "engine.recompute", "train.micro_batch_tokens")


@dataclass(frozen=True)
class Choice:
    """The decisions of the memory plan. A resumed run takes the recorded ones, so that it stays the same run."""

    layers: tuple[str, ...]
    """Layers recomputed in the backward pass."""
    micro_tokens: Count
    recompute: bool
    """True if cheap activations are recomputed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the form written into checkpoints."""
        return {"layers": list(self.layers), "micro_tokens": self.micro_tokens, "recompute": self.recompute}


@dataclass(frozen=True)
class Memory:
    """The decisions and the memory they are expected to need."""

    choice: Choice
    engaged: Engaged
    order: Order
    megabytes: int
    note: str = ""
    """A warning if it will not fit."""


def recorded(saved: Mapping[str, Any], recipe: Mapping[str, Any], where: str = "the checkpoint") -> Choice | None:
    """Return the choice in the essentials of checkpoint `where`, if the flat `recipe` asks for the same as theirs."""
    if not saved["memory"] or any(saved["recipe"].get(key) != recipe.get(key) for key in _ASKED):
        return None
    return from_json(Choice, saved["memory"], f"{where}: memory")


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
    """Decide recomputation and splitting, no more than the budget demands: cheap activations, layers, then batches.

    Args:
        engaged: with ``recompute`` on if it is allowed.
        order: micro-batch tokens → the run's order.
        micro_tokens: tokens per forward pass unless memory demands less.
        taken: a recorded choice to keep.

    Raises:
        ConfigError: ``engine.checkpointing`` is on, and there is nothing to recompute, or the gradients differ with it.
    """
    wish, why_not, layers = recipe.engine.checkpointing, "", ()
    try:
        layers = recomputable(model)
        why_not = "" if layers else "no layer keeps activations: everything trainable is above the last layer"
    except TargetError as error:
        why_not = error.message
    if wish == "on" and layers:
        why_not = _unlike(model, task, examples, engaged, layers)
    if wish == "on" and why_not:
        raise ConfigError(f"engine.checkpointing is on, but {why_not}", "set engine.checkpointing: auto or off")
    if taken is not None and set(taken.layers) <= set(layers):
        engaged = engaged if taken.recompute else engaged.without(Recompute.key, "as in the checkpoint")
        return _Planner(recipe, model, task, examples, engaged, order).memory(taken.layers, taken.micro_tokens, "as in the checkpoint")
    if wish != "on" and engaged.has(Recompute.key) and recipe.engine.recompute == "auto":
        planner = _Planner(recipe, model, task, examples, engaged.without(Recompute.key, "not needed"), order)
        found = planner.memory((), micro_tokens, "not needed")
        if planner.fits(found):
            return found
    planner = _Planner(recipe, model, task, examples, engaged, order)
    if wish == "on":
        return planner.within(layers, micro_tokens, "")
    first = planner.memory((), micro_tokens, "not needed")
    if planner.fits(first):
        return first
    if wish == "auto" and layers:
        why_not = _unlike(model, task, examples, engaged, layers)
    if wish == "off" or why_not:
        return planner.within((), micro_tokens, why_not or "switched off")
    why = f"without it about {first.megabytes:,} MB"
    few = planner.fewest(layers, micro_tokens)
    if few:
        found = planner.memory(few, micro_tokens, why)
        if planner.fits(found):
            return found
    return planner.within(layers, micro_tokens, why)


def _unlike(model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, layers: tuple[str, ...]) -> str:
    """Return why a step that recomputes `layers` is not the step that keeps them; ``""`` if it is."""
    batch = engaged.batch(task, probe_rows(task, examples), next(model.parameters()).device)
    return repeats(model, batch, engaged, Checkpointing(layers), loss=task.loss)


@dataclass(frozen=True)
class _Shape:
    """The sizes that the memory of one micro-batch depends on."""

    cells: int
    squares: int
    labels: int
    copied: int = 0
    """Keys of rows that reuse a shared prefix: the prefix's keys are copied next to their own."""


@dataclass(frozen=True)
class _Phases:
    """Live bytes in one forward and backward pass."""

    forward: int
    """Peak before the loss."""
    kept: int
    """Live after the trunk."""
    loss: int
    """Peak on top of that, until the gradient reaches the trunk."""
    backward: int
    """Peak after that."""


class _Planner:
    """The measurements of one run, each made once."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, task: Task[Any], examples: Sequence[Any], engaged: Engaged, order: Callable[[int], Order]
    ) -> None:
        self.model, self.task, self.examples, self.engaged, self.order_of = model, task, examples, engaged, order
        self.device = next(model.parameters()).device
        config: Any = model.config
        self.pairs = not (engaged.packed and str(config._attn_implementation).endswith("sdpa"))
        """True if memory grows with squared lengths: packs need no mask over token pairs, and sdpa keeps no scores."""
        trim()
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.held = held_bytes(model, self.device)
        self.static = self.held + 3 * trained  # gradients and AdamW's moments
        self.updating = self.static + 2 * trained
        """Memory during AdamW's step, with its temporaries."""
        self.asked = recipe.engine.memory_mb
        available = available_bytes(self.device)
        machine = None if available is None else self.held + int((1 - MARGIN) * available)
        self.budget = machine if self.asked is None else self.asked * MEGABYTE
        self.may_cut = recipe.train.micro_batch_tokens == "auto"
        self.models: dict[tuple[str, ...], _Model] = {}

    def fits(self, memory: Memory) -> bool:
        return self.budget is None or memory.megabytes * MEGABYTE <= self.budget

    def memory(self, layers: Sequence[str], micro_tokens: int, why: str) -> Memory:
        """Return the memory needed with `layers` recomputed and steps split into `micro_tokens`."""
        order = self.order_of(micro_tokens)
        engaged = self.engaged.without(Checkpointing.key, why)
        if layers:
            words = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
            engaged = self.engaged.with_lever(Checkpointing(tuple(layers)), f"{words}; {why}" if why else words)
        alive = self.model_of(engaged, order).most(self.shapes(order))
        peak = max(self.static + int(alive * LOOSE.get(self.device.type, LOOSE["cuda"])), self.updating)
        megabytes = max(peak, high_water_bytes(self.device)) // MEGABYTE
        found = Memory(Choice(tuple(layers), micro_tokens, engaged.has(Recompute.key)), engaged, order, megabytes)
        if self.budget is None or self.fits(found):
            return found
        limit = f"engine.memory_mb: {self.asked}" if self.asked is not None else f"the {self.budget // MEGABYTE:,} MB available"
        return replace(found, note=f"more than {limit}")

    def within(self, layers: Sequence[str], micro_tokens: int, why: str) -> Memory:
        """Return the same with smaller micro-batches until it fits, if the recipe leaves their size open."""
        found = first = self.memory(layers, micro_tokens, why)
        while self.may_cut and not self.fits(found) and found.choice.micro_tokens > FEWEST:
            found = self.memory(layers, max(found.choice.micro_tokens // 2, FEWEST), why)
        return found if found.megabytes < first.megabytes else first

    def fewest(self, layers: Sequence[str], micro_tokens: int) -> tuple[str, ...]:
        """Return the lowest layers that suffice if each saves an equal share.

        The lowest, because recomputing late in the backward pass adds nothing to its peak.
        """
        none, every = (self.memory(chosen, micro_tokens, "").megabytes for chosen in ((), layers))
        if self.budget is None or none <= every or every * MEGABYTE > self.budget:
            return ()
        share = (none - self.budget // MEGABYTE) / (none - every)
        return tuple(layers[: min(int(share * len(layers)) + 1, len(layers))])

    def model_of(self, engaged: Engaged, order: Order) -> _Model:
        layers = layers_of(engaged)
        if layers not in self.models:
            self.models[layers] = _Model(self.model, self.task, engaged, self.batches(order), pairs=self.pairs)
        return self.models[layers]

    def shapes(self, order: Order) -> list[_Shape]:
        return [self.shape([self.examples[i] for i in micro]) for step in order.epoch(0) for micro in step]

    def shape(self, examples: Sequence[Any], engaged: Engaged | None = None) -> _Shape:
        engaged = engaged or self.engaged
        lengths = [self.task.length(e) for e in examples]
        if not engaged.packed:
            lengths = [max(lengths)] * len(lengths)
        tokens, copied = sum(lengths), 0
        if sharing_of(engaged) is not None:
            parts = Sharing(examples).layout(range(len(examples)))
            tokens, copied = sum(part.end - part.begin for part in parts), sum(part.end for part in parts if part.begin)
        return _Shape(tokens, sum(n * n for n in lengths), sum(map(self.task.labels, examples)), copied)

    def batches(self, order: Order) -> list[tuple[_Shape, dict[str, Any], int]]:
        """Return the batches to measure: the largest micro-batch if small, else a few small ones of pieces of rows.

        Each with its shape, and the size below which its tensors are not recomputed: :data:`SMALLEST`, scaled down from
        the largest micro-batch.
        """
        micros = [[self.examples[i] for i in micro] for step in order.epoch(0) for micro in step]
        largest = max(micros, key=lambda micro: self.shape(micro).cells)
        cells = self.shape(largest).cells

        def sample(examples: Sequence[Any], engaged: Engaged) -> tuple[_Shape, dict[str, Any], int]:
            shape = self.shape(examples, engaged)
            return shape, engaged.batch(self.task, examples, self.device), SMALLEST * shape.cells // cells

        if cells <= EXACT:
            return [sample(largest, self.engaged)]
        labelled = [e for e in self.examples if self.task.labels(e) > 0] or list(self.examples)
        longest = sorted(labelled, key=self.task.length, reverse=True)
        alone = self.engaged.without(SharePrefix.key, "")
        sizes = PROBES if self.pairs else PROBES[:2]
        found = [sample(_pieces(longest, self.task, count, tokens), alone) for count, tokens in sizes]
        if sharing_of(self.engaged) is not None:
            found.append(sample(_pieces(longest, self.task, *SHARED), self.engaged))
        return found


def _pieces(rows: Sequence[Any], task: Task[Any], count: int, tokens: int) -> list[Any]:
    """Return `count` pieces of at most `tokens` tokens of the first rows, repeating if needed; more if short."""
    found, room = list[Any](), count * tokens
    for row in cycle(rows):
        if room < tokens:
            break
        found.append(task.cut(row, tokens))
        room -= task.length(found[-1])
    return found


class _Model:
    """Live bytes as a function of a micro-batch's shape."""

    def __init__(
        self, model: nn.Module, task: Task[Any], engaged: Engaged, samples: Sequence[tuple[_Shape, dict[str, Any], int]], *, pairs: bool
    ) -> None:
        shapes = [shape for shape, _, _ in samples]
        found = [measured(model, task, engaged, batch, smallest=smallest) for _, batch, smallest in samples]
        self.forward = _with_copies(shapes, [one.forward for one in found], pairs=pairs)
        self.kept = _with_copies(shapes, [one.kept for one in found], pairs=pairs)
        self.backward = _with_copies(shapes, [one.backward for one in found], pairs=pairs)
        self.loss = _loss_fit(model, task, engaged, shapes, [one.loss for one in found])

    def most(self, shapes: Sequence[_Shape]) -> int:
        """Return the peak over all micro-batches."""
        return int(max(max(self.forward(s), self.kept(s) + self.loss(s), self.backward(s)) for s in shapes))


def measured(model: nn.Module, task: Task[Any], engaged: Engaged, batch: Mapping[str, Any], *, smallest: int = SMALLEST) -> _Phases:
    """Count live bytes in one forward and backward of `batch`; model, modes and random generators are restored.

    `smallest`: elements of the smallest tensor that is recomputed (:data:`byway.engine.backward.recompute.SMALLEST`).
    """
    recompute = engaged.find(Recompute)
    if recompute is not None:
        engaged = engaged.with_lever(replace(recompute, smallest=smallest))
    fresh = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    marks: list[int] = []
    with modes_restored(model), randomness.preserved():
        training_mode(model)
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)  # as in all micro-batches of a step except the first
        try:
            with engaged.engaged(model), live(model, batch) as count, ExitStack() as hooks:

                def trunk_done(module: nn.Module, args: Any, out: Any) -> None:
                    hidden = out if isinstance(out, Tensor) else out[0]
                    if not marks:
                        marks.extend((count.peak(), count.now()))
                        if isinstance(hidden, Tensor) and hidden.requires_grad:
                            hidden.register_hook(lambda _: marks.append(count.peak()))

                found = facts(model)
                paths = [found.trunk] if found.trunk is not None else list(found.stack_modules.values())[-1:]
                for path in paths:
                    hooks.callback(model.get_submodule(path).register_forward_hook(trunk_done).remove)
                loss, labels = task.loss(model, batch, labels_only=engaged.labels_only)
                (loss / max(labels, 1)).backward()
                last = count.peak()
                del loss
        finally:
            for parameter in fresh:
                parameter.grad = None
    if len(marks) < 2:
        return _Phases(last, 0, 0, 0)
    at_loss = marks[2] if len(marks) > 2 else last
    return _Phases(marks[0], marks[1], at_loss - marks[1], last if len(marks) > 2 else 0)


_Curve = Callable[[_Shape], float]


def _with_copies(shapes: Sequence[_Shape], values: Sequence[int], *, pairs: bool) -> _Curve:
    """Fit the samples that share nothing with :func:`_fit`, then a number of bytes per copied key to the others."""
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
    """Fit a + b·of(shape) + c·squares (if `pairs`) by least squares; drop c, then a, if they would be negative."""
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
    """Fit the loss's bytes: by labels if only these have logits; those beyond one chunk add only hidden states."""
    if not (engaged.labels_only and task.language_model):
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
