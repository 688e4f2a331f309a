r"""Parallel adapter: FFN(x) + s·f(x), f(h) = W_up·σ(W_down·h + b_d) + b_u, next to the whole feed-forward sub-layer.

::

    x ──┬──── feed-forward (frozen) ────(+)── z         W_down (m, d), W_up (d, m)
        └─ down ─ σ ─ up ── ·s ──────────┘

Source: He et al., "Towards a unified view", arXiv 2110.04366 §4 (parallel and scaled parallel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Le
from torch import nn

from byway.core.families.sublayers import SubLayer
from byway.core.fields import Dropout, Layers, Positive, Rank
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site, base_modules
from byway.errors import TargetError
from byway.methods.bottleneck.places import Activation, Place, chosen, shape_at
from byway.methods.bottleneck.sides import Beside, Init, Tap

__all__ = ["ParallelAdapter"]


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """A small two-layer network next to each feed-forward sub-layer, scaled and added to its output.

    Attaching leaves the output unchanged (`init: zero`). Trainable parameters: 2dm + m + d per layer, for width d and
    bottleneck m; one more with `scaling: learned`, 2d more with `layer_norm`.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model's feed-forward sub-layers cannot be determined, or something named is not there.
    """

    reduction: Positive = 2
    """The bottleneck has width d/reduction, rounded down, at least 1."""
    size: Rank | None = None
    """m: width of the bottleneck, in place of `reduction`."""
    activation: Activation | None = None
    """σ; null: ``relu``, as published."""
    scaling: Annotated[float, Le(10**6)] | Literal["learned"] = 4.0
    """s, the factor on the adapter's output; ``learned``: a trainable scalar per layer that starts at 1."""
    dropout: Dropout = 0.0
    """Dropout probability on the adapter's output."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """Give the adapter a layer norm of its own, on its input or on its output."""
    init: Init = "zero"
    """Initial weights: ``zero``, W_up = 0, so that attaching leaves the output as it is; ``houlsby``, truncated normal
    with standard deviation 1e-3; ``bert``, normal with standard deviation 0.02."""
    reads: Literal["input", "residual"] = "input"
    """Input of the adapter: ``input``, that of the feed-forward sub-layer; ``residual``, in pre-norm models the
    residual stream before the norm."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out: names, or a regular expression for whole paths."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    def contradictions(self) -> list[str]:
        return ["scaling is 0; the adapter would have no effect"] if self.scaling == 0 else []

    def plan(self, model: nn.Module) -> Placement:
        def site(part: SubLayer) -> str:
            # a whole feed-forward module has f's input as its own; its output comes before a dropout that follows it
            direct = self.reads == "input" or part.norm is not None
            return part.entry if direct and part.entry is not None and part.whole else part.output

        return Placement(chosen(model, ("feed-forward",), site, exclude=self.exclude, layers=self.layers))

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site, Place)
        tap = None if self._source(site) is None else context.shared.setdefault((self, site.path), Tap())
        return Beside(shape_at(self, site, self.activation or "relu"), context.generator, tap)

    def _source(self, place: Place) -> str | None:
        """Return the module whose input f reads; None: the site itself."""
        part = place.part
        if self.reads == "input" or part.norm is not None:
            return None if part.entry == place.path else part.entry
        if part.residual is None:
            raise TargetError(
                f"the feed-forward part of {part.layer} has no residual of its own (a parallel block, or one that scales first)",
                "use reads: input",
            )
        return part.residual

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        modules = dict(base_modules(model))
        for site in planned:
            source = self._source(site) if isinstance(site, Place) else None
            if source is not None:
                yield Site(source, modules[source]), context.shared[self, site.path]
