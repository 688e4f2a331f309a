"""A method: a frozen value that chooses the modules to adapt and builds the side paths for them."""

from __future__ import annotations

import itertools
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from byway.core.fields import valid
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site
from byway.errors import ConfigError, listed, nearest

__all__ = ["Attached", "BuildContext", "Frozen", "Method", "Placement", "without_weight_decay"]


class Frozen(dict[str, Any]):
    """A hashable mapping, so that a method with patterns stays a value."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the fields of a method cannot be changed: create another method")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        return Frozen, (dict(self),)


def _frozen(given: Any, value: Any) -> Any:
    """Return the checked `value`, immutable; an int stays as `given`, so that a file says ``16`` and not ``16.0``."""
    if isinstance(value, Mapping):
        return Frozen({key: _frozen(given[key], item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(itertools.starmap(_frozen, zip(given if isinstance(given, (list, tuple)) else value, value, strict=True)))
    return given if type(given) is int else value


@dataclass(frozen=True)
class BuildContext:
    """Everything a method may need to build its side paths."""

    tokenizer: Any = None
    batches: Sequence[Mapping[str, Tensor]] | None = None
    """Calibration batches, ready to be passed to the model."""
    generator: torch.Generator = field(default_factory=lambda: torch.default_generator)
    """Source of random initial values; a CPU generator, so that they do not depend on the device."""
    trusted: bool = True
    """False while a file is read: code that only a file names is not imported."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """State shared by the side paths of one attach (a trained tensor used at several modules), under any key."""
    filled: bool = False
    """True if a file will fill every tensor, so that a costly initialization can be skipped."""


@dataclass(frozen=True)
class Placement:
    """The modules that a method adapts in one model."""

    sites: Sequence[Site]
    notes: Sequence[str] = ()
    """What the method left out or decided on its own, one sentence each, for the user."""


class _MethodType(ABCMeta):
    """Answer a misspelt field with the nearest one, as a recipe does."""

    if not TYPE_CHECKING:  # a type checker reads the dataclass's own signature

        def __call__(cls, *args: Any, **values: Any) -> Any:
            known = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else values
            unknown = [name for name in values if name not in known]
            if unknown:
                ours = cls.elsewhere.get(unknown[0], "")
                ours = ours if ours in known else ""
                hint = f"it is called {ours!r} here" if ours else nearest(unknown[0], known) or f"it has: {listed(sorted(known), 40)}"
                raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}", hint)
            return super().__call__(*args, **values)


class Attached(Protocol):
    """What methods and file formats need of an adapter: one method's side paths on one model."""

    model: nn.Module
    name: str
    method: Method
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        ...

    def side_paths(self) -> list[tuple[Site, SidePath]]:
        """(site, side path), in module order."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable tensors, each once, by their full names in the model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Method(metaclass=_MethodType):
    """How side paths are made. The fields are the recipe's keys; an instance is a hashable, picklable value."""

    modules_to_save: Literal["auto", "none"] | Sequence[str] = "auto"
    """Modules to train in full, as copies: ``auto`` (the model's task heads), ``none``, or names."""

    peft: ClassVar[PeftFormat[Any] | None] = None
    """How HF peft writes this method, or None if peft does not have it."""
    mergeable: ClassVar[bool] = False
    """True if the trained side paths can be folded into the base's weights."""
    merges_where: ClassVar[str] = ""
    """The models on which it can be merged, in a few words, if :attr:`mergeable` does not hold for all."""
    identity_at_start: ClassVar[bool] = True
    """True if attaching leaves the output equal to the frozen base's."""
    packable: ClassVar[bool] = True
    """True if several documents may be packed into one row (False for virtual tokens, which every document would
    need)."""
    quantized_base: ClassVar[bool] = True
    """True if it works on a base whose linear maps are kept in 8 or 4 bits."""
    elsewhere: ClassVar[dict[str, str]] = {"target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers"}
    """Names that other libraries give the fields → our names, for the hint of an error."""
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str) and self.modules_to_save not in ("auto", "none"):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))  # a single name, from Python
        for name, value in valid(self).items():
            object.__setattr__(self, name, _frozen(getattr(self, name), value))
        problems = self.contradictions()
        if problems:
            raise ConfigError("; ".join(problems))

    def contradictions(self) -> list[str]:
        """Name every combination of valid values that cannot work; default none."""
        return []

    @classmethod
    def merging(cls) -> str:
        """Say whether it can be merged: ``yes``, ``no``, or on which models."""
        return (cls.merges_where or "yes") if cls.mergeable else "no"

    @abstractmethod
    def plan(self, model: nn.Module) -> Placement:
        """Choose the modules of `model` that get a side path. The model is not touched.

        Raises:
            TargetError: something that the fields name is not in the model.
        """

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse fields that do not fit these sites (a rank too large).

        Called when attaching, not when a file is loaded: there the tensors decide.
        """
        return

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        """Return this method with the fields that depend on data filled in (ranks); default: itself.

        Called when attaching, not when a file is loaded.
        """
        return self

    @abstractmethod
    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        """Build the side path for one site, on the site's device."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        """Yield further side paths that depend on all the sites (trained biases); default: none."""
        return iter(())

    def with_token_rows(self, model: nn.Module, tokens: Sequence[int]) -> Method | None:
        """Return this method so that it trains the rows of `tokens` in the embedding and the head; None: it cannot."""
        return None

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; default: one."""
        return [{"params": [p for _, p in adapter.named_parameters()], "lr": learning_rate}]

    def after_step(self, adapter: Attached, step: int, total: int) -> None:
        """Do what is due after optimizer step `step` of `total` (a rank schedule); default: nothing."""


def without_weight_decay(adapter: Attached, learning_rate: float, *kinds: type[SidePath]) -> list[dict[str, Any]]:
    """Return parameter groups: the side paths of these `kinds` without weight decay, then everything else with it."""
    chosen = {id(p) for _, side in adapter.side_paths() if isinstance(side, kinds) for p in side.parameters()}
    parameters = [p for _, p in adapter.named_parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in chosen], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [p for p in parameters if id(p) not in chosen], "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]
