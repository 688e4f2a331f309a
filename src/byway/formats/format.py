"""A file format: which directories it reads, which adapters it can hold, and how it loads and saves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from byway.core.disk.files import read_json
from byway.core.method import Attached, Method
from byway.core.slots import SidePath, Site
from byway.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Format", "LoadOptions", "Loaded"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of :func:`byway.load`, which explains them."""

    check_base: bool = True
    methods: tuple[type[Method], ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    allow_unknown_fields: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of the method that replace the file's."""
    allow_import: bool = False


@dataclass(frozen=True)
class Loaded:
    """An adapter read from files: side paths for one model, filled and not yet attached."""

    method: Method
    plan: Sequence[tuple[Site, SidePath]]
    notes: Sequence[str]


class Format(ABC):
    """A format of adapter directories.

    Formats are asked in ascending `order`. The first that reads a directory loads it; the first that does not decline
    an adapter saves it.
    """

    label: ClassVar[str]
    """Name of the format in reports such as ``byway inspect``."""
    order: ClassVar[int]
    files: ClassVar[tuple[str, ...]]
    """Names of the files it writes, besides ``README.md``: first the configuration, by which a directory is recognized,
    then the tensors."""

    def reads(self, directory: Path) -> bool:
        """True if `directory` holds an adapter in this format."""
        return (directory / self.files[0]).is_file()

    def read_config(self, directory: Path) -> dict[str, Any]:
        """Return the configuration in `directory`, its values checked as far as no model is needed.

        Raises:
            AdapterError: the file cannot be read, or a value is of a wrong kind.
        """
        return read_json(directory / self.files[0])

    @abstractmethod
    def declines(self, adapter: Attached) -> str:
        """Return why this format cannot hold `adapter` exactly; ``""`` if it can."""

    def describe(self, directory: Path, options: LoadOptions) -> Method:
        """Return the method of the adapter in `directory`, as far as it is known without the model.

        Raises:
            AdapterError: the configuration is wrong, or says too little without the model.
        """
        raise AdapterError(
            f"{directory}: an adapter in the format of {self.label} cannot be read without its model",
            "byway.load it in Python and save it in another format",
        )

    @abstractmethod
    def load(self, model: nn.Module, directory: Path, options: LoadOptions) -> Loaded:
        """Read the adapter in `directory` for `model`, which is not touched.

        Raises:
            AdapterError: anything wrong with the files, or between them and the model.
        """

    @abstractmethod
    def save(self, adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write `adapter` into `directory` itself, in one step.

        Raises:
            AdapterError: a tensor is not finite, or `directory` holds something other than an adapter.
            RunError: the disk refused. In both cases `directory` is unchanged.
        """
