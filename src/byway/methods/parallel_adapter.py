r"""Parallel adapter: FFN(x) + s·f(x), f(h) = W_up·σ(W_down·h + b_d) + b_u, beside the whole feed-forward part.

::

    x ──┬──── feed-forward (frozen) ────(+)── z         W_down (m, d), W_up (d, m)
        └─ down ─ σ ─ up ── ·s ──────────┘

Source: He et al., "Towards a unified view", arXiv 2110.04366 §4 (parallel and scaled parallel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from byway.core.families.sublayers import SubLayer
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.errors import ConfigError, TargetError
from byway.methods.bottleneck.places import Activation, Place, chosen, shape_at, shape_problems
from byway.methods.bottleneck.sides import Beside, Init, Tap

__all__ = ["ParallelAdapter"]


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """A small two-layer network beside each feed-forward part, scaled and added to what that answers.

    Attaching leaves the output as it is (`init: zero`). Trained: 2dm + m + d numbers a layer for width d and bottleneck m, one more with
    `scaling: learned`, 2d more with `layer_norm`.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model's feed-forward parts cannot be told, or something named is not there.
    """

    reduction: float = 2
    """The bottleneck is d/reduction wide, rounded down, at least 1."""
    size: int | None = None
    """m: the width of the bottleneck, instead of `reduction`."""
    activation: Activation | None = None
    """σ; none: ``relu``, as published."""
    scaling: float | Literal["learned"] = 4.0
    """s; ``learned``: one trained number a layer that starts at 1."""
    dropout: float = 0.0
    """Dropout on what is added, in [0, 1)."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """A layer norm of the adapter's own, on what it reads or on what it adds."""
    init: Init = "zero"
    """``zero``: W_up = 0, attaching changes nothing. ``houlsby``: truncated normal, deviation 1e-3. ``bert``: normal, deviation 0.02."""
    reads: Literal["input", "residual"] = "input"
    """What f reads: ``input`` what the feed-forward reads; ``residual`` in pre-norm models the stream before its norm."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out: names, or a regular expression for whole paths."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = shape_problems(self)
        if self.reads not in ("input", "residual"):
            problems.append(f"reads is {self.reads!r}; it must be input or residual")
        if problems:
            raise ConfigError("; ".join(problems))

    def sites(self, model: nn.Module) -> Iterator[Site]:
        def site(part: SubLayer) -> str:
            # a whole feed-forward module sees its own input; its output is then taken before a dropout that follows it
            direct = self.reads == "input" or part.norm is not None
            return part.entry if direct and part.entry is not None and part.whole else part.output

        yield from chosen(model, ("feed-forward",), site, exclude=self.exclude, layers=self.layers)

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site, Place)
        source = self._source(site)
        if source is None:
            tap = None
        else:
            tap = context.shared[self, site.path] = Tap()
        return Beside(shape_at(self, site, self.activation or "relu"), context.generator, tap)

    def _source(self, place: Place) -> str | None:
        """The module whose input f reads; None: the site itself."""
        part = place.part
        if self.reads == "input" or part.norm is not None:
            return None if part.entry == place.path else part.entry
        if part.residual is None:
            raise TargetError(
                f"{part.layer} adds its feed-forward part to no residual of its own (a parallel block, or one scaled first)",
                "leave reads at 'input'",
            )
        return part.residual

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        modules = dict(base_modules(model))
        for site in planned:
            source = self._source(site) if isinstance(site, Place) else None
            if source is not None:
                yield Site(source, modules[source]), context.shared[self, site.path]
