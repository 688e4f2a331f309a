"""The classes of a trained head, kept in the record of the adapter's file: an adapter without its run has no others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.core.copies import TrainedCopy
from byway.core.disk.files import read_safetensors
from byway.core.families import facts
from byway.core.families.facts import inside
from byway.core.method import Attached
from byway.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Classes", "recorded_classes"]


@dataclass(frozen=True)
class Classes:
    """What a task head was trained to tell apart."""

    names: tuple[str, ...]
    """In the order of their indices."""
    problem: str | None = None
    """transformers' ``problem_type``: single_label_classification, multi_label_classification or regression."""

    @classmethod
    def of(cls, adapter: Attached) -> Classes | None:
        """Return those that `adapter` was trained with; None if it trains no task head."""
        heads = facts(adapter.model).task_heads
        copies = [site.path for site, side in adapter.side_paths() if isinstance(side, TrainedCopy)]
        return _stated(adapter.model) if any(inside(path, head) for path in copies for head in heads) else None

    def name(self, model: Any) -> bool:
        """Write them into the configuration of `model`, if it has as many; True if it had other names."""
        own = _stated(model)
        if own is None or len(own.names) != len(self.names):
            return False
        config = model.config
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: index for index, name in enumerate(self.names)}
        config.problem_type = self.problem
        return own.names != self.names

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {"names": list(self.names), "problem": self.problem}


def recorded_classes(directory: Path) -> Classes | None:
    """Return the classes that the file of the adapter in `directory` records; None if it records none.

    Raises:
        AdapterError: the record is malformed.
    """
    for file in sorted(directory.glob("*.safetensors")):
        text = read_safetensors(file)[1].get("byway", "{}")
        try:
            stated = json.loads(text).get("classes")
            if stated is None:
                continue
            names, problem = stated["names"], stated["problem"]
            if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names) or not isinstance(problem, str | None):
                raise ValueError(f"classes are {stated!r}")
            return Classes(tuple(names), problem)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
            raise AdapterError(f"{file}: its metadata is malformed: {failure!r}") from failure
    return None


def _stated(model: nn.Module) -> Classes | None:
    """Return the classes in a model's configuration; None if it has none, or not one for each index."""
    config: Any = vars(model).get("config")
    if config is None:
        return None
    names = {int(index): str(name) for index, name in (config.to_dict().get("id2label") or {}).items()}
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names) or not names:
        return None
    return Classes(tuple(names[index] for index in sorted(names)), config.problem_type)
