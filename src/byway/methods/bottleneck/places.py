"""The sub-layers that get a bottleneck, and its shape there, for both bottleneck methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from byway.core.families import facts, layer_index, locate
from byway.core.families.sublayers import SubLayer, layer_norms, sublayers
from byway.core.slots import Site, base_modules
from byway.core.targets.search import Search, Selection
from byway.core.weights import device_of, factor_dtype
from byway.errors import TargetError, listed
from byway.methods.bottleneck.sides import Init, Shape

__all__ = ["Activation", "Place", "Shaped", "bottleneck_size", "chosen", "norms_of", "shape_at"]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swish", "tanh", "sigmoid", "leaky_relu"]


@dataclass(frozen=True)
class Place(Site):
    """A site and its sub-layer."""

    part: SubLayer
    width: int
    """d."""
    like: nn.Module
    """A linear map of the sub-layer, whose device and dtype the bottleneck follows."""


class Shaped(Protocol):
    """The fields that both methods share."""

    @property
    def reduction(self) -> float: ...
    @property
    def size(self) -> int | None: ...
    @property
    def activation(self) -> Activation | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def scaling(self) -> float | Literal["learned"]: ...
    @property
    def layer_norm(self) -> Literal["none", "in", "out"]: ...
    @property
    def init(self) -> Init: ...


def bottleneck_size(width: int, reduction: float, size: int | None) -> int:
    """Return m: `size`, or d/reduction rounded down, at least 1."""
    return size if size is not None else max(1, int(width // reduction))


def shape_at(method: Shaped, place: Place, activation: Activation) -> Shape:
    """Return the shape of the bottleneck at `place`."""
    return Shape(
        width=place.width,
        size=bottleneck_size(place.width, method.reduction, method.size),
        activation=activation,
        dropout=method.dropout,
        scaling=method.scaling,
        layer_norm=method.layer_norm,
        init=method.init,
        dtype=factor_dtype(place.like),
        device=device_of(place.like),
    )


def chosen(
    model: nn.Module,
    roles: Sequence[str],
    site: Callable[[SubLayer], str],
    *,
    exclude: str | Sequence[str] | None,
    layers: str | int | Sequence[int | str] | None,
) -> list[Place]:
    """Return the places of the sub-layers in `roles` and `layers`, without those in `exclude`, in module order.

    Raises:
        TargetError: the sub-layers cannot be determined, none has one of the roles, or `exclude` or `layers` names
            something that is not there.
    """
    modules = dict(base_modules(model))
    parts = {site(part): part for part in sublayers(model) if part.role in roles}
    there = {part.role for part in parts.values()}
    missing = [role for role in roles if role not in there]
    if missing:
        raise TargetError(f"{type(model).__name__} has no {listed(missing)} sub-layer to add an adapter to", "leave it out of places")
    search = Search(model, lambda _: True)
    found: Selection = {listed(roles): list(parts)}
    if layers is not None:
        found = search.in_layers(found, layers)
    if exclude is not None:
        found = search.without(found, exclude)
    search.finish()
    kept = {path for paths in found.values() for path in paths}
    return [Place(path, modules[path], part, part.width(modules), modules[part.map]) for path, part in parts.items() if path in kept]


def norms_of(model: nn.Module, planned: Sequence[Site], *, everywhere: bool, exclude: str | Sequence[str] | None) -> list[str]:
    """Return the layer norms to train: all of them, or those of the layers that contain a site in `planned`."""
    paths = list(layer_norms(model))
    if not everywhere:
        index = layer_index(facts(model).stacks)
        inside = {locate(place.path, index) for place in planned}
        paths = [path for path in paths if (at := locate(path, index)) is not None and at in inside]
    if exclude is not None:
        search = Search(model, lambda _: True)
        paths = list(search.without({"norms": paths}, exclude)["norms"])
    return paths
