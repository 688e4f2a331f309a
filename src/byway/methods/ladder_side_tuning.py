r"""Ladder Side-Tuning: a narrow transformer next to the frozen one, which reads the output b_i of each block.

h ← μ_i·h + (1 − μ_i)·D_i(b_i), h ← SideBlock_i(h), y = U(h).

::

    e ── block 0 ── block 1 ── … ── block L-1 ── norm        backbone (d), frozen, no graph, replaced at its end
    │       │          │               │
   D_0     D_1        D_2             D_L                    one-way connections (d → s = d/ρ)
    │       │          │               │
    └─(μ)─ side 0 ─(μ)─ side 1 ── … ─(μ)─ side L-1 ─ norm ─ U ── head (the backbone's own)

μ_i = sigmoid(a_i/T). No gradient enters the backbone, and none of its activations is kept.

Source: Sung, Cho, Bansal, arXiv 2206.06522 §3 and the authors' code (T5). The paper applies μ to the backbone's term,
the code to the side network's; the sign of a absorbs the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.families.facts import inside
from byway.core.fields import Count, Layers, Positive
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site, side_paths
from byway.core.weights import device_of
from byway.errors import AdapterError, TargetError
from byway.methods.ladder.blocks import build
from byway.methods.ladder.importance import fisher, magnitude
from byway.methods.ladder.network import Ladder, Role
from byway.methods.ladder.pruning import Pruning, readable, residual
from byway.methods.ladder.taps import Entrance, Tap, trained_inside
from byway.methods.ladder.widths import Plan, Stack, plan

__all__ = ["LadderSideTuning"]


@dataclass(frozen=True)
class Rung(Site):
    """A block of the backbone that the ladder reads."""

    ladder: Plan
    stack: Stack
    index: int
    """Number of the block in its stack."""


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """A narrow side network that reads the outputs of the frozen blocks and feeds the model's own head.

    Trainable parameters: the side blocks, the maps down (D) and up (U), the gates and the last norm; in classifiers
    also the head. Attaching changes the output. The backbone stays in evaluation mode during training (no dropout).

    Raises:
        ConfigError: a value out of range, or a reduction that does not divide the widths.
        TargetError: an unsupported family, or layers that do not exist.
        AdapterError: another adapter is trained inside the backbone, to which a ladder passes no gradient.
    """

    reduction: Count | None = None
    """ρ: divides widths, feed-forward widths and head sizes, without remainder; null: the first of 8, 4 and 2 that
    does."""
    keep: Layers | None = None
    """Layers that get a side block, counted within each stack: indices, or ranges such as ``16-``; null: all."""
    drop: Layers | None = None
    """Layers without a side block, in place of `keep` and written like it."""
    init: Literal["magnitude", "fisher", "random"] = "magnitude"
    """Initial side blocks: pruned from the backbone by ``magnitude`` or by ``fisher`` information (needs batches with
    labels), or ``random``."""
    gate: Literal["learned", "fixed", "add"] = "learned"
    """How a side block's input is formed: μ·h + (1 − μ)·D(b) with ``learned`` μ or ``fixed`` μ = ½, or (``add``) h +
    D(b)."""
    temperature: Positive = 0.1
    """T of the gates μ = sigmoid(a/T); gates learn 1/T times faster."""
    mix_output: bool = False
    """Add a last learned gate that mixes U(h) with the backbone's own output."""

    identity_at_start: ClassVar[bool] = False

    def contradictions(self) -> list[str]:
        return ["keep and drop are both given; use one of them"] if self.keep is not None and self.drop is not None else []

    def plan(self, model: nn.Module) -> Placement:
        chosen = plan(model, self.reduction, self.keep, self.drop)
        rungs: list[Site] = []
        for stack in chosen.stacks:
            busy = [*trained_inside(model.get_submodule(stack.path)), *_feeding(model, stack.path)]
            if busy:
                raise AdapterError(
                    f"adapter {busy[0]!r} is trained inside {stack.path or 'the model'}, below the ladder, which passes no gradient to it",
                    "load it without trainable=True, or detach it",
                )
            for index in sorted({0, *stack.keep}):
                rungs.append(Rung(stack.layers[index], model.get_submodule(stack.layers[index]), chosen, stack, index))
        still = "the backbone stays in evaluation mode while the ladder is trained (without dropout)"
        return Placement(rungs, [chosen.note, still] if chosen.note else [still])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site, Rung)
        return (Tap if site.index else Entrance)(site.index, model.get_submodule(site.stack.path))

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        first_rung = next((site for site in planned if isinstance(site, Rung)), None)
        if first_rung is None:
            raise TargetError("modules_to_save trains every block of the backbone; the ladder has none left to read", "name fewer modules")
        chosen = first_rung.ladder
        ladders = [(stack, self._ladder(model, chosen, stack, context.generator)) for stack in chosen.stacks]
        on_meta = any(p.is_meta for p in model.parameters())
        if self.init != "random" and chosen.kind.prunable and not on_meta and not context.filled:
            self._prune(model, chosen, ladders, context)
        for stack, ladder in ladders:
            own = model.get_submodule(stack.path)
            first = model.get_submodule(stack.layers[0])
            wide = next((p.dtype for p in own.parameters() if p.dtype == torch.float64), torch.float32)
            yield Site(stack.path, own), ladder.to(device=device_of(first), dtype=wide)

    def _ladder(self, model: nn.Module, chosen: Plan, stack: Stack, generator: torch.Generator) -> Ladder:
        names = [s.name for s in chosen.stacks]
        role: Role = "alone" if names != ["encoder", "decoder"] else "encoder" if stack.name == "encoder" else "decoder"
        twin = build(model, chosen, stack, generator)
        own, still = model.get_submodule(stack.path), model.get_submodule(stack.home)
        with torch.device(device_of(model.get_submodule(stack.layers[0])) if any(p.is_meta for p in own.parameters()) else "cpu"):
            ladder = Ladder(stack, twin, own, still, role=role, gate=self.gate, t=self.temperature, mix=self.mix_output)
        ladder.initialize(generator)
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
            source = width.get("encoder", width[stack.name])  # the input of a cross-attention
            Pruning(chosen.kind, importance, config, chosen.reduction, owner, width[stack.name], source).fill(pairs)
            ladder.copy_norm(width[stack.name])


def _feeding(model: nn.Module, stack: str) -> list[str]:
    """Return the adapters that train what goes into `stack` at a module around it: virtual tokens."""
    return [
        name
        for site, name, side in side_paths(model)
        if inside(stack, site.path) and side.overrides("before") and not side.detached and side.needs_gradient()
    ]
