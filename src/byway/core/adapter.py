"""What is attached to a model: adapters by name, and the record that the model's root keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from byway.core.dead_sites import Watch
from byway.core.method import Method
from byway.core.slots import SidePath, Site, _full_name, base_modules, side_paths, slots
from byway.core.summary import summarize
from byway.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Adapter", "adapters"]


class Adapter:
    """One attached method: the side paths of one name on one model."""

    def __init__(self, model: nn.Module, name: str, method: Method, notes: tuple[str, ...] = ()) -> None:
        self.model = model
        self.name = name
        self.method = method
        self.notes = notes
        """What was decided while attaching or loading that the user should know."""

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {type(self.method).__name__}, {self.num_parameters:,} parameters)"

    def side_paths(self) -> list[tuple[Site, SidePath]]:
        """(site, side path), in module order."""
        return [(site, side) for site, name, side in side_paths(self.model) if name == self.name]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors this adapter trains, each once, by their full names in the model; frozen factors are buffers and not among them."""
        seen: set[int] = set()
        for path, key, side in self._hung():
            for own, parameter in side.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield _full_name(path, key, own), parameter

    def _hung(self) -> Iterator[tuple[str, str, SidePath]]:
        """(module path, key in its slot, side path)."""
        for path, _, slot in slots(self.model):
            for key, name, side in slot.entries():
                if name == self.name:
                    yield path, key, side

    @property
    def num_parameters(self) -> int:
        """How many numbers this adapter trains."""
        return sum(p.numel() for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything training resumes from: parameters and persistent buffers by their full names in the model (not copied)."""
        return {_full_name(path, key, k): v for path, key, side in self._hung() for k, v in side.state_dict().items()}

    def summary(self) -> str:
        """Which kinds of modules in which layers are adapted, and how much of the model is trained; uneven coverage is pointed out."""
        return summarize(self)

    def save(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write the adapter's files into the directory `path` itself, replacing an adapter that is there; anything else is refused.

        `tokenizer`: recorded (as hashes, with its chat template) so that loading with another one is noticed.

        Raises:
            AdapterError: `path` holds something other than an adapter, a tensor is not finite, or the adapter was merged or detached.
            RunError: the disk refused. In both cases what was there is unchanged.
        """
        from byway.formats.save import save_adapter

        if adapters(self.model).get(self.name) is not self:  # its tensors are gone, or those of another one of that name
            raise AdapterError(
                f"adapter {self.name!r} no longer hangs on the model: it was merged or detached, and nothing is left to save",
                "save it before byway.merge or byway.detach",
            )
        return save_adapter(self, Path(path), tokenizer)


@dataclass
class _Root:
    """What the root of an attached model remembers, beside its own side paths."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    """The base's parameters that required a gradient before the first attach."""
    watch: Watch = field(default_factory=Watch)
    load_hook: RemovableHandle | None = None
    attention: Any = None
    """What to put back if our attention function was installed (``engine.attention.Installed``)."""


_ROOT = "_byway_root"
"""Where the root keeps its record: a plain attribute, since a child would be one more layer of an nn.Sequential."""


def _roots(model: nn.Module) -> list[tuple[nn.Module, _Root]]:
    """Roots at or below `model` (below: it is wrapped, by DDP or a Lightning module)."""
    own = vars(model).get(_ROOT)
    if own is not None:
        return [(model, own)]
    return [(module, vars(module)[_ROOT]) for _, module in base_modules(model) if _ROOT in vars(module)]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name, in attach order."""
    return {name: adapter for _, root in _roots(model) for name, adapter in root.adapters.items()}
