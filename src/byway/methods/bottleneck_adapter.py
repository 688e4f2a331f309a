r"""Bottleneck adapter: z → z + f(z), f(h) = W_up·σ(W_down·h + b_d) + b_u, inside each layer, before the residual is added.

::

    houlsby (twice a layer)                       pfeiffer (once, after the feed-forward part), post-norm models
    z ──┬───────────────(+)── + x ── LN           z + x ──┬───────────────────────(+)── LN
        └─ down ─ σ ─ up ┘                                └─ LN ─ down ─ σ ─ up ───┘
                                                  pre-norm models: z + f(z + x)

Source: Houlsby et al., arXiv 1902.00751 §2; Pfeiffer et al., arXiv 2005.00247 §3.2 and arXiv 2007.07779.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from byway.core.families.sublayers import SubLayer
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.errors import ConfigError
from byway.methods.bottleneck.places import Activation, Place, chosen, norms_of, shape_at, shape_problems
from byway.methods.bottleneck.sides import BeforeNorm, Init, OnOutput, OnSum, Tap, TrainedNorm

__all__ = ["BottleneckAdapter", "Where"]

Where = Literal["attention", "cross-attention", "feed-forward"]

_PLACES: dict[str, tuple[Where, ...]] = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
_ACTIVATIONS: dict[str, Activation] = {"houlsby": "gelu", "pfeiffer": "relu"}


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Method):
    """A small two-layer network in each layer, on what a sub-layer adds to the residual stream.

    Attaching leaves the output as it is (`init: zero`). Trained: 2dm + m + d numbers for each adapter of width d and bottleneck m, two a
    layer (houlsby) or one (pfeiffer), and with `norms` the weights and biases of all layer norms.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model's sub-layers cannot be told, or something named is not there.
    """

    variant: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Where it reads: ``houlsby`` what the sub-layer adds; ``pfeiffer`` the sum with the residual, normalized in post-norm models."""
    reduction: float = 16
    """The bottleneck is d/reduction wide, rounded down, at least 1."""
    size: int | None = None
    """m: the width of the bottleneck, instead of `reduction`."""
    activation: Activation | None = None
    """σ; none: ``gelu`` (houlsby) or ``relu`` (pfeiffer), as published."""
    places: Sequence[Where] | None = None
    """After which sub-layers; none: attention and feed-forward (houlsby), feed-forward (pfeiffer). Cross-attention only when named."""
    dropout: float = 0.0
    """Dropout on what is added, in [0, 1)."""
    scaling: float | Literal["learned"] = 1.0
    """What is added is multiplied by this, or by one trained number that starts at 1."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """A layer norm of the adapter's own, on what it reads or on what it adds."""
    init: Init = "zero"
    """``zero``: W_up = 0, attaching changes nothing. ``houlsby``: truncated normal, deviation 1e-3. ``bert``: normal, deviation 0.02."""
    norms: bool | None = None
    """Train the model's layer norms too, beside the base; none: yes for houlsby, no for pfeiffer, as published."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out: names, or a regular expression for whole paths."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``; norms outside them are left frozen."""

    identity_at_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = shape_problems(self)
        if self.variant not in _PLACES:
            problems.append(f"variant is {self.variant!r}; it must be houlsby or pfeiffer")
        if self.places is not None:
            wrong = [place for place in self.places if place not in ("attention", "cross-attention", "feed-forward")]
            problems += [f"places names {place!r}; there are attention, cross-attention and feed-forward" for place in wrong]
            if not self.places or len(set(self.places)) < len(self.places):
                problems.append(f"places is {self.places!r}; each place is named once, and at least one")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def roles(self) -> tuple[Where, ...]:
        """`places`, or the variant's own."""
        return _PLACES[self.variant] if self.places is None else tuple(self.places)

    @property
    def trains_norms(self) -> bool:
        """`norms`, or as the variant was published."""
        return self.variant == "houlsby" if self.norms is None else self.norms

    def sites(self, model: nn.Module) -> Iterator[Site]:
        def site(part: SubLayer) -> str:
            return part.norm if self.variant == "pfeiffer" and part.norm is not None else part.output

        yield from chosen(model, self.roles, site, exclude=self.exclude, layers=self.layers)

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site, Place)
        shape = shape_at(self, site, self.activation or _ACTIVATIONS[self.variant])
        if self.variant == "houlsby":
            return OnOutput(shape, context.generator)
        if site.part.norm is not None:
            return BeforeNorm(shape, context.generator, site.module)
        if site.part.residual is None:  # a parallel block: there is no sum of its own to read
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

    def param_groups(self, adapter: Any, learning_rate: float) -> list[dict[str, Any]]:
        """The norms without weight decay (it would draw them to zero), everything else with it."""
        norms = {id(p) for _, side in adapter.side_paths() if isinstance(side, TrainedNorm) for p in side.parameters()}
        parameters = [p for _, p in adapter.named_parameters()]
        groups = [
            {"params": [p for p in parameters if id(p) not in norms], "lr": learning_rate},
            {"params": [p for p in parameters if id(p) in norms], "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
