"""The names that HF peft gives to a method: the fields of its configuration, and its tensors in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from byway.core.slots import SidePath, Site

__all__ = ["PeftFormat"]

M = TypeVar("M")


class PeftFormat(ABC, Generic[M]):
    """Translate between one method and HF peft's ``adapter_config.json`` and ``adapter_model.safetensors``.

    A method file derives a class, writes :meth:`fields` and :meth:`method`, and sets ``peft = ThatClass("LORA")`` on
    its method. Override the rest only where peft differs from the sites and ``SidePath.peft_names``.
    """

    def __init__(self, peft_type: str) -> None:
        self.peft_type = peft_type
        """peft's name for the method."""

    def declines(self, method: M, model: nn.Module, installed: Sequence[tuple[Site, SidePath]]) -> str:
        """Return why peft's format cannot hold `method` with its side paths on `model`; ``""`` if it can.

        It cannot if HF peft would compute something else from the files.
        """
        return ""

    @abstractmethod
    def fields(self, method: M) -> dict[str, Any]:
        """Return the configuration fields that follow from the method's own fields."""

    def site_fields(self, method: M, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration fields that follow from the side paths and replace those in `config`."""
        return {}

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors from ``base_model.model.<module path>.<name>`` to peft's keys for this method."""
        return tensors

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Invert :meth:`to_file` for a file read for `model`."""
        return tensors

    def reads(self, config: Mapping[str, Any]) -> bool:
        """True if `config` describes this method; override it where several methods share a ``peft_type``."""
        return config.get("peft_type") == self.peft_type

    def normalized(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return `config` with ``rank_pattern`` and ``alpha_pattern`` as patterns of module paths → numbers."""
        return dict(config)

    @abstractmethod
    def method(self, kind: type[M], config: Mapping[str, Any]) -> M:
        """Build the method, of class `kind`, that a configuration describes."""
