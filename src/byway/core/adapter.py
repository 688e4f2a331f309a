"""The adapters attached to a model, and the record that the model's root keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from byway.core.dead_sites import Watch
from byway.core.method import Method
from byway.core.slots import SidePath, Site, base_modules, full_name, side_paths, slots
from byway.core.summary import summarize
from byway.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROOT", "Adapter", "Root", "adapters", "roots"]


class Adapter:
    """One attached method: the side paths of one name on one model."""

    def __init__(self, model: nn.Module, name: str, method: Method, notes: tuple[str, ...] = ()) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.notes = notes
        """Decisions made while attaching or loading that the user should know of."""

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {type(self.method).__name__}, {self.num_parameters:,} parameters)"

    def side_paths(self) -> list[tuple[Site, SidePath]]:
        """Return (site, side path), in module order."""
        return [(site, side) for site, name, side in side_paths(self.model) if name == self.name]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable tensors, each once, by full name in the model; frozen factors are buffers."""
        seen: set[int] = set()
        for path, key, side in self._installed():
            for own, parameter in side.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield full_name(path, key, own), parameter

    def _installed(self) -> Iterator[tuple[str, str, SidePath]]:
        """(module path, key in its slot, side path)."""
        for path, _, slot in slots(self.model):
            for key, name, side in slot.entries():
                if name == self.name:
                    yield path, key, side

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Return what training resumes from: parameters and persistent buffers by full name, not copied."""
        return {full_name(path, key, k): v for path, key, side in self._installed() for k, v in side.state_dict().items()}

    def summary(self) -> str:
        """Describe the adapted modules and the number of trainable parameters; uneven coverage of layers is marked."""
        return summarize(self)

    def save(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write the adapter's files into the directory `path` itself and return it; an adapter in it is replaced.

        HF peft's format is used if it can hold the adapter, else Byway's own.

        Args:
            path: a new directory, or one with an adapter's files and nothing else.
            tokenizer: recorded (as hashes, with its chat template) so that loading with another one is noticed.

        Raises:
            AdapterError: `path` holds something other than an adapter, a tensor is not finite, or the adapter was
                merged or detached.
            RunError: the disk refused. In both cases `path` is unchanged.
        """
        from byway.formats.save import save_adapter

        if adapters(self.model).get(self.name) is not self:  # its tensors are gone, or belong to another adapter of that name
            raise AdapterError(
                f"adapter {self.name!r} is no longer attached to the model: it was merged or detached, and nothing is left to save",
                "save it before byway.merge or byway.detach",
            )
        return save_adapter(self, Path(path), tokenizer)


@dataclass
class Root:
    """The record that the root of an attached model keeps."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    """The base's parameters that required a gradient before the first attach."""
    watch: Watch = field(default_factory=Watch)
    load_hook: RemovableHandle | None = None
    attention: Any = None
    """What to restore if our attention function was installed (``core.attention.Installed``)."""


ROOT = "_byway_root"
"""Attribute of the root for its record; not a child, which would be one more layer of an nn.Sequential."""


def roots(model: nn.Module) -> list[tuple[nn.Module, Root]]:
    """Return the roots at or below `model` (below if it is wrapped, by DDP or a Lightning module)."""
    own = vars(model).get(ROOT)
    if own is not None:
        return [(model, own)]
    return [(module, vars(module)[ROOT]) for _, module in base_modules(model) if ROOT in vars(module)]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the attached adapters by name, in attach order."""
    return {name: adapter for _, root in roots(model) for name, adapter in root.adapters.items()}
