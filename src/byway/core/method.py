"""What a method is: a frozen value that says where side paths hang and builds them."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from byway.core.slots import SidePath, Site
from byway.errors import AdapterError, ConfigError, listed, nearest

__all__ = ["Attached", "BuildContext", "Frozen", "Method"]


class Frozen(dict[str, Any]):
    """A mapping that can be hashed, so that a method with patterns stays a value."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a method's fields cannot be changed: make another method")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        return Frozen, (dict(self),)


@dataclass(frozen=True)
class BuildContext:
    """What a method may need to build its side paths."""

    tokenizer: Any = None
    batches: Sequence[Mapping[str, Tensor]] | None = None
    """Calibration batches, ready to be passed to the model."""
    generator: torch.Generator = field(default_factory=lambda: torch.default_generator)
    """Source of every random start; a CPU generator, so that a start does not depend on the device."""
    trusted: bool = True
    """False while a file is read: code that only a file names is not imported."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What the side paths of one attach have in common (a trained tensor that stands in several modules), by any key."""
    filled: bool = False
    """Whether a file is going to fill every tensor, so that a costly start would be for nothing."""


class _Named(ABCMeta):
    """Answers a misspelt field with the nearest one, as a recipe does."""

    if not TYPE_CHECKING:  # a checker reads the dataclass's own signature

        def __call__(cls, *args: Any, **values: Any) -> Any:
            known = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else values
            unknown = [name for name in values if name not in known]
            if unknown:
                meant = cls.elsewhere.get(unknown[0], "")
                meant = meant if meant in known else ""
                hint = f"it is called {meant!r} here" if meant else nearest(unknown[0], known) or f"it has: {listed(sorted(known), 40)}"
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
class Method(metaclass=_Named):
    """How side paths are made. A subclass's fields are the recipe's keys; an instance is a value (hashable, comparable, picklable)."""

    modules_to_save: Literal["auto", "none"] | Sequence[str] = "auto"
    """Modules trained whole, as copies: ``auto`` (the task heads that the model has), ``none``, or names."""

    peft_type: ClassVar[str | None] = None
    """HF peft's name for this method, or None where it has none."""
    mergeable: ClassVar[bool] = False
    """Whether what it trains can be folded into the base's weights."""
    merges_where: ClassVar[str] = ""
    """On which models only, in a few words, where :attr:`mergeable` is not said of all."""
    identity_at_start: ClassVar[bool] = True
    """Whether the output right after attach equals the frozen base's."""
    packable: ClassVar[bool] = True
    """Whether several documents may be packed into one row (virtual tokens would have to stand in each)."""
    quantized_base: ClassVar[bool] = True
    """Whether it goes with a base whose linear maps are kept in 8 or 4 bits."""
    elsewhere: ClassVar[dict[str, str]] = {"target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers"}
    """What other libraries call the fields: their name → ours, for the hint of an error."""
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            elif isinstance(value, Mapping) and not isinstance(value, Frozen):
                object.__setattr__(self, f.name, Frozen(value))

    @classmethod
    def merging(cls) -> str:
        """Whether it can be merged, in words: ``yes``, ``no``, or on which models."""
        return (cls.merges_where or "yes") if cls.mergeable else "no"

    @abstractmethod
    def sites(self, model: nn.Module) -> Iterator[Site]:
        """Where side paths hang; raises :class:`TargetError` for anything asked for that is not there."""

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        """What :meth:`sites` left out on purpose and the user should know; default nothing."""
        return ()

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse what does not fit these sites (a rank too large); asked when attaching, not for a file, where the tensors decide."""
        return

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        """This method with everything settled that depends on data (ranks); asked when attaching, not for a file. Default: itself."""
        return self

    @abstractmethod
    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        """The side path for one site, on the site's device."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        """Further side paths that depend on all the sites (trained biases); default none."""
        return iter(())

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups; default one."""
        return [{"params": [p for _, p in adapter.named_parameters()], "lr": learning_rate}]

    def after_step(self, adapter: Attached, step: int, total: int) -> None:
        """Called after each optimizer step (a budget schedule); default nothing."""

    def to_peft(self) -> dict[str, Any]:
        """This method as fields of peft's ``adapter_config.json``."""
        raise AdapterError(f"HF peft has no format for {type(self).__name__}", "save it in Byway's own format")

    def peft_fields(self, hung: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """Further fields of peft's configuration, or other values, that follow from what hangs where; default none."""
        return {}

    def declines_peft(self, model: nn.Module) -> str:
        """Why peft's format cannot hold this method on `model`, so that Byway's own is used; ``""`` where it can (default)."""
        return ""

    def to_peft_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by the names of the weight methods → as peft keeps them for this method; default the same."""
        return dict(tensors)

    @classmethod
    def from_peft_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The inverse of :meth:`to_peft_tensors`, for a file read beside the model it is for; default the same."""
        return dict(tensors)

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether this method is the one that a peft configuration describes; asked where several share a ``peft_type``."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @classmethod
    def normalized_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with ``rank_pattern`` and ``alpha_pattern`` as patterns of module paths to numbers; default as it is."""
        return dict(config)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method:
        """The method that a peft ``adapter_config.json`` describes."""
        raise AdapterError(f"HF peft has no format for {cls.__name__}")
