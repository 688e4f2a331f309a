r"""Ladder Side-Tuning: a narrow transformer climbs beside the frozen one: h ← μ_i·h + (1 − μ_i)·D_i(b_i), h ← SideBlock_i(h), y = U(h).

::

    e ── block 0 ── block 1 ── … ── block L-1 ── norm        backbone (d), frozen, no graph, replaced at its end
    │       │          │               │
   D_0     D_1        D_2             D_L                    one-way connections (d → s = d/ρ)
    │       │          │               │
    └─(μ)─ side 0 ─(μ)─ side 1 ── … ─(μ)─ side L-1 ─ norm ─ U ── head (the backbone's own)

μ_i = sigmoid(a_i/T). No gradient enters the backbone, and none of its activations is kept.

Source: Sung, Cho, Bansal, arXiv 2206.06522 §3 and the authors' code (T5). The paper puts μ on the backbone's term, the code on the side's;
the sign of a absorbs the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site
from byway.core.weights import device_of
from byway.errors import AdapterError, ConfigError
from byway.methods.ladder.blocks import build
from byway.methods.ladder.importance import fisher, magnitude
from byway.methods.ladder.network import Ladder, Role
from byway.methods.ladder.pruning import prune, readable, residual
from byway.methods.ladder.taps import Entrance, Tap, trained_inside
from byway.methods.ladder.widths import Plan, Stack, plan

__all__ = ["LadderSideTuning"]


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """A narrow side network that reads the outputs of the frozen blocks; the model's own head reads what it gives.

    Trained: the side blocks, the maps down (D) and up (U), the gates and the last norm; for classifiers the head as well.
    The output at attach is not the base's. The backbone stays in evaluation mode also while training (no dropout).

    Raises:
        ConfigError: a value out of range, or a reduction that does not divide the widths.
        TargetError: a family for which no side blocks are known, or layers that are not there.
        AdapterError: another adapter is trained inside the backbone, which a ladder passes no gradient to.
    """

    reduction: int | None = None
    """ρ: widths, feed-forward widths and head sizes are divided by it, exactly; none: the first of 8, 4, 2 that fits."""
    keep: str | int | Sequence[int | str] | None = None
    """Layers that get a side block, counted per stack: indices, or ranges such as ``16-``; none: all."""
    drop: str | int | Sequence[int | str] | None = None
    """Layers that get none, written like `keep`; instead of it."""
    init: Literal["magnitude", "fisher", "random"] = "magnitude"
    """How side blocks start: pruned from the backbone by magnitude or by Fisher information (needs batches with labels), or random."""
    gate: Literal["learned", "fixed", "add"] = "learned"
    """How a rung joins: μ·h + (1 − μ)·D(b) with a learned μ or with μ = ½, or h + D(b)."""
    temperature: float = 0.1
    """T of the gates μ = sigmoid(a/T); a gate learns 1/T times faster."""
    mix_output: bool = False
    """Whether a last learned gate mixes U(h) with the backbone's own output."""

    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.reduction is not None and (type(self.reduction) is not int or self.reduction < 1):
            problems.append(f"reduction is {self.reduction!r}; it must be a whole number from 1")
        if self.keep is not None and self.drop is not None:
            problems.append("keep and drop are both given; one says what the other leaves")
        if self.init not in ("magnitude", "fisher", "random"):
            problems.append(f"init is {self.init!r}; it must be magnitude, fisher or random")
        if self.gate not in ("learned", "fixed", "add"):
            problems.append(f"gate is {self.gate!r}; it must be learned, fixed or add")
        t = self.temperature
        if isinstance(t, bool) or not isinstance(t, int | float) or not math.isfinite(t) or t <= 0:
            problems.append(f"temperature is {t!r}; it must be a positive number")
        if problems:
            raise ConfigError("; ".join(problems))

    def sites(self, model: nn.Module) -> Iterator[Site]:
        for stack in self._plan(model).stacks:
            busy = trained_inside(model.get_submodule(stack.path))
            if busy:
                raise AdapterError(
                    f"adapter {busy[0]!r} is trained inside {stack.path or 'the model'}, below the ladder, which passes no gradient to it",
                    "load it without trainable=True, or detach it",
                )
            for index in sorted({0, *stack.keep}):
                yield Site(stack.layers[index], model.get_submodule(stack.layers[index]))

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        note = self._plan(model).note
        return (*([note] if note else []), "the backbone stays in evaluation mode while the ladder is trained (no dropout in it)")

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        stack = next(stack for stack in self._plan(model).stacks if site.path in stack.layers)
        index = stack.layers.index(site.path)
        return (Tap if index else Entrance)(index, model.get_submodule(stack.path))

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        chosen = self._plan(model)
        ladders = [(stack, self._ladder(model, chosen, stack, context.generator)) for stack in chosen.stacks]
        on_meta = any(p.is_meta for p in model.parameters())
        if self.init != "random" and not on_meta and not context.filled:
            self._prune(model, chosen, ladders, context)
        for stack, ladder in ladders:
            own = model.get_submodule(stack.path)
            first = model.get_submodule(stack.layers[0])
            wide = next((p.dtype for p in own.parameters() if p.dtype == torch.float64), torch.float32)
            yield Site(stack.path, own), ladder.to(device=device_of(first), dtype=wide)

    def _plan(self, model: nn.Module) -> Plan:
        return plan(model, self.reduction, self.keep, self.drop)

    def _ladder(self, model: nn.Module, chosen: Plan, stack: Stack, generator: torch.Generator) -> Ladder:
        names = [s.name for s in chosen.stacks]
        role: Role = "alone" if names != ["encoder", "decoder"] else "encoder" if stack.name == "encoder" else "decoder"
        twin = build(model, chosen, stack, generator)
        own, still = model.get_submodule(stack.path), model.get_submodule(stack.home)
        with torch.device(device_of(model.get_submodule(stack.layers[0])) if any(p.is_meta for p in own.parameters()) else "cpu"):
            ladder = Ladder(stack, twin, own, still, role=role, gate=self.gate, t=self.temperature, mix=self.mix_output)
        ladder.start(generator)
        return ladder

    def _prune(self, model: nn.Module, chosen: Plan, ladders: Sequence[tuple[Stack, Ladder]], context: BuildContext) -> None:
        layers = {stack.name: [model.get_submodule(stack.layers[i]) for i in stack.keep] for stack, _ in ladders}
        importance: Any = magnitude
        if self.init == "fisher":
            modules = {id(m): m for stack, _ in ladders for m in readable(model.get_submodule(stack.home), layers[stack.name])}
            importance = fisher(model, list(modules.values()), context.batches)
        width: dict[str, Tensor] = {}
        for stack, ladder in ladders:
            config = model.get_submodule(stack.path).config
            width[stack.name] = residual(model.get_submodule(stack.home), config, importance, chosen.reduction)
            pairs = dict(zip(layers[stack.name], ladder.side_block.values(), strict=True))
            table = chosen.kind.position_table
            owner = None if table is None else model.get_submodule(f"{stack.layers[0]}.{table}")
            source = width.get("encoder", width[stack.name])  # what a cross-attention reads
            prune(chosen.kind, config, chosen.reduction, pairs, importance, owner, width[stack.name], source)
            ladder.start_norm(width[stack.name])
