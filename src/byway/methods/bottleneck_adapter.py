r"""Bottleneck adapter: z → z + f(z), f(h) = W_up·σ(W_down·h + b_d) + b_u, in each layer, before the residual is added.

::

    houlsby (twice per layer)                     pfeiffer (once, after feed-forward), post-norm models
    z ──┬───────────────(+)── + x ── LN           z + x ──┬───────────────────────(+)── LN
        └─ down ─ σ ─ up ┘                                └─ LN ─ down ─ σ ─ up ───┘
                                                  pre-norm models: z + f(z + x)

Source: Houlsby et al., arXiv 1902.00751 §2; Pfeiffer et al., arXiv 2005.00247 §3.2 and arXiv 2007.07779.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Le, MinLen
from torch import nn

from byway.core.families.sublayers import SubLayer
from byway.core.fields import Dropout, Layers, Positive, Rank
from byway.core.method import Attached, BuildContext, Method, Placement, without_weight_decay
from byway.core.slots import SidePath, Site, base_modules
from byway.methods.bottleneck.places import Activation, Place, chosen, norms_of, shape_at
from byway.methods.bottleneck.sides import BeforeNorm, Init, OnOutput, OnSum, Tap, TrainedNorm

__all__ = ["BottleneckAdapter", "Where"]

Where = Literal["attention", "cross-attention", "feed-forward"]

_PLACES: dict[str, tuple[Where, ...]] = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
_ACTIVATIONS: dict[str, Activation] = {"houlsby": "gelu", "pfeiffer": "relu"}


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Method):
    """A small two-layer network in each layer, on the output that a sub-layer adds to the residual stream.

    Attaching leaves the output unchanged (`init: zero`). Trainable parameters: 2dm + m + d per adapter, for width d and
    bottleneck m, with two adapters per layer (houlsby) or one (pfeiffer); with `norms`, also the weights and biases of
    all layer norms.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model's sub-layers cannot be determined, or something named is not there.
    """

    variant: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Input of the adapter: ``houlsby``, the output of the sub-layer; ``pfeiffer``, its sum with the residual, after
    the norm in post-norm models."""
    reduction: Positive = 16
    """The bottleneck has width d/reduction, rounded down, at least 1."""
    size: Rank | None = None
    """m: width of the bottleneck, in place of `reduction`."""
    activation: Activation | None = None
    """σ; null: as published, ``gelu`` (houlsby) or ``relu`` (pfeiffer)."""
    places: Annotated[Sequence[Where], MinLen(1)] | None = None
    """Sub-layers that get an adapter; null: attention and feed-forward (houlsby), or feed-forward (pfeiffer).
    Cross-attention only if it is listed."""
    dropout: Dropout = 0.0
    """Dropout probability on the adapter's output."""
    scaling: Annotated[float, Le(10**6)] | Literal["learned"] = 1.0
    """Factor on the adapter's output; ``learned``: a trainable scalar that starts at 1."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """Give the adapter a layer norm of its own, on its input or on its output."""
    init: Init = "zero"
    """Initial weights: ``zero``, W_up = 0, so that attaching leaves the output as it is; ``houlsby``, truncated normal
    with standard deviation 1e-3; ``bert``, normal with standard deviation 0.02."""
    norms: bool | None = None
    """Train the model's layer norms as well, as copies; null: as published, true for houlsby and false for pfeiffer."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out: names, or a regular expression for whole paths."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all. Norms of other layers stay frozen."""

    identity_at_start: ClassVar[bool] = True

    def contradictions(self) -> list[str]:
        problems = ["scaling is 0; the adapter would have no effect"] if self.scaling == 0 else []
        if len(set(self.places or ())) < len(self.places or ()):
            problems.append(f"places is {list(self.places or ())!r}; list each once")
        return problems

    @property
    def roles(self) -> tuple[Where, ...]:
        """`places`, or the variant's own."""
        return _PLACES[self.variant] if self.places is None else tuple(self.places)

    @property
    def trains_norms(self) -> bool:
        """`norms`, or as the variant was published."""
        return self.variant == "houlsby" if self.norms is None else self.norms

    def plan(self, model: nn.Module) -> Placement:
        def site(part: SubLayer) -> str:
            return part.norm if self.variant == "pfeiffer" and part.norm is not None else part.output

        return Placement(chosen(model, self.roles, site, exclude=self.exclude, layers=self.layers))

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site, Place)
        shape = shape_at(self, site, self.activation or _ACTIVATIONS[self.variant])
        if self.variant == "houlsby":
            return OnOutput(shape, context.generator)
        if site.part.norm is not None:
            return BeforeNorm(shape, context.generator, site.module)
        if site.part.residual is None:  # a parallel block has no sum of its own to read
            return OnOutput(shape, context.generator)
        tap = context.shared[self, site.path] = Tap()
        return OnSum(shape, context.generator, tap)

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        modules = dict(base_modules(model))
        for site in planned:
            tap = context.shared.get((self, site.path))
            if isinstance(site, Place) and tap is not None and site.part.residual is not None:
                yield Site(site.part.residual, modules[site.part.residual]), tap
        if self.trains_norms:
            for path in norms_of(model, planned, everywhere=self.layers is None, exclude=self.exclude):
                yield Site(path, modules[path]), TrainedNorm(modules[path])

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups without weight decay for the norms, which it would pull to zero."""
        return without_weight_decay(adapter, learning_rate, TrainedNorm)[::-1]
