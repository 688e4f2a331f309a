"""Which sub-layers a bottleneck goes to, and of what shape it is there: what the two bottleneck methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from byway.core.families import facts, layer_index, locate
from byway.core.families.sublayers import SubLayer, layer_norms, sublayers
from byway.core.fields import dropout_problems, finite
from byway.core.slots import Site, base_modules
from byway.core.weights import device_of
from byway.errors import TargetError, listed
from byway.methods.bottleneck.sides import ACTIVATIONS, Init, Shape

if TYPE_CHECKING:
    from byway.core.targets.search import Selection

__all__ = ["Activation", "Place", "Shaped", "bottleneck_size", "chosen", "norms_of", "shape_at", "shape_problems"]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swish", "tanh", "sigmoid", "leaky_relu"]


@dataclass(frozen=True)
class Place(Site):
    """A site that knows which sub-layer it belongs to."""

    part: SubLayer
    width: int
    """d there."""
    like: nn.Module
    """A linear map of the base beside it."""


class Shaped(Protocol):
    """The fields that both methods have."""

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


def shape_problems(method: Shaped) -> list[str]:
    """What is wrong with the fields that both methods have."""
    problems = []
    if not finite(method.reduction) or method.reduction <= 0:
        problems.append(f"reduction is {method.reduction!r}; it must be a positive number")
    if method.size is not None and (not isinstance(method.size, int) or isinstance(method.size, bool) or method.size < 1):
        problems.append(f"size is {method.size!r}; it must be a whole number from 1 on")
    if method.activation is not None and method.activation not in ACTIVATIONS:
        problems.append(f"activation is {method.activation!r}; there are: {listed(ACTIVATIONS)}")
    problems += dropout_problems(method.dropout)
    if method.scaling != "learned" and (not finite(method.scaling) or method.scaling == 0):
        problems.append(f"scaling is {method.scaling!r}; it must be a number other than 0, or 'learned'")
    if method.layer_norm not in ("none", "in", "out"):
        problems.append(f"layer_norm is {method.layer_norm!r}; it must be none, in or out")
    if method.init not in ("zero", "houlsby", "bert"):
        problems.append(f"init is {method.init!r}; it must be zero, houlsby or bert")
    return problems


def bottleneck_size(width: int, reduction: float, size: int | None) -> int:
    """m: `size`, or d/reduction rounded down, at least 1."""
    return size if size is not None else max(1, int(width // reduction))


def shape_at(method: Shaped, place: Place, activation: Activation) -> Shape:
    """The shape of the bottleneck at `place`."""
    weight = place.like._parameters.get("weight")
    wide = isinstance(weight, Tensor) and weight.dtype == torch.float64
    return Shape(
        width=place.width,
        size=bottleneck_size(place.width, method.reduction, method.size),
        activation=activation,
        dropout=method.dropout,
        scaling=method.scaling,
        layer_norm=method.layer_norm,
        init=method.init,
        dtype=torch.float64 if wide else torch.float32,
        device=device_of(place.like),
    )


def chosen(
    model: nn.Module,
    roles: Sequence[str],
    site: Callable[[SubLayer], str],
    *,
    exclude: str | Sequence[str] | None,
    layers: str | int | Sequence[int | str] | None,
) -> Iterator[Place]:
    """The places of the sub-layers in `roles`, in module order, without those outside `layers` and what `exclude` names.

    Raises:
        TargetError: the sub-layers cannot be told, none has one of the roles, or `exclude` or `layers` names what is not there.
    """
    from byway.core.targets.search import Search

    modules = dict(base_modules(model))
    parts = {site(part): part for part in sublayers(model) if part.role in roles}
    there = {part.role for part in parts.values()}
    missing = [role for role in roles if role not in there]
    if missing:
        raise TargetError(f"{type(model).__name__} has no {listed(missing)} sub-layer to put an adapter after", "leave it out of places")
    search = Search(model, lambda _: True)
    found: Selection = {listed(roles): list(parts)}
    if layers is not None:
        found = search.in_layers(found, layers)
    if exclude is not None:
        found = search.without(found, exclude)
    search.finish()
    kept = {path for paths in found.values() for path in paths}
    for path, part in parts.items():
        if path in kept:
            yield Place(path, modules[path], part, part.width(modules), modules[part.map])


def norms_of(model: nn.Module, planned: Sequence[Site], *, everywhere: bool, exclude: str | Sequence[str] | None) -> list[str]:
    """The layer norms to train: all of the model, or those of the layers in which something of `planned` lies."""
    from byway.core.targets.search import Search

    paths = list(layer_norms(model))
    if not everywhere:
        index = layer_index(facts(model).stacks)
        inside = {locate(place.path, index) for place in planned}
        paths = [path for path in paths if (at := locate(path, index)) is not None and at in inside]
    if exclude is not None:
        search = Search(model, lambda _: True)
        paths = list(search.without({"norms": paths}, exclude)["norms"])
    return paths
