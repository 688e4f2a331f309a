"""Weights of a vocabulary that was resized before training: peft writes them whole, next to the adapter.

The file holds the embedding's and the head's weights as ``<path>.weight`` (beside the adapter), ``<path>.base_layer.*``
(a target) or ``<path>.token_adapter.base_layer.*`` (trained rows). Equal to the base's, they are ignored. Otherwise
they are installed as frozen replacements, on a base with as many rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.copies import bare_copy, tied_to
from byway.core.families import facts
from byway.core.slots import SidePath, Site, base_modules
from byway.core.weights import dense, is_embedding
from byway.errors import AdapterError, listed

__all__ = ["ReplacedWeight", "Vocabulary"]

_SPELLINGS = ("", "base_layer.", "token_adapter.base_layer.")


class ReplacedWeight(SidePath):
    """y = f(x; W'): the module with the weight W' (and bias) of a file, a buffer: saved, never trained."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        super().__init__()
        twin = bare_copy(module)
        for name, parameter in list(twin._parameters.items()):
            if parameter is not None:
                del twin._parameters[name]
                value = tensors[name].to(parameter.dtype).to(parameter.device) if name in tensors else parameter.detach()
                twin.register_buffer(name, value.clone())
        self.copy = twin
        # what is tied to a replaced weight follows it and is not written a second time: it has no names
        self.peft_names = {f"copy.{part}": name for part, name in names.items()}

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        return self.copy(**inputs)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = dict(self.copy.named_buffers())
        return {name: own[name].to(tensor.dtype).clone() if name in own else tensor for name, tensor in tensors.items()}


class Vocabulary:
    """The weights of embeddings and of the head in a file.

    Args:
        model: the base.
        keys: module path → the beginning of its keys in the file.
        tensors: the file's tensors.
        copied: paths of modules that the adapter holds whole; only the shapes are checked.

    Raises:
        AdapterError: a weight has another shape than the base's (the message says how to resize), or is not finite.
    """

    def __init__(
        self, model: nn.Module, keys: Mapping[str, str], tensors: Mapping[str, Tensor], copied: Collection[str], where: Path
    ) -> None:
        self.model = model
        self.modules = dict(base_modules(model))
        self.found: dict[str, dict[str, str]] = {}
        """Module path → {``weight`` or ``bias``: its name below the path}."""
        self.tensors: dict[str, Tensor] = {}
        self.keys = keys
        head = facts(model).head
        for path, module in self.modules.items():
            if not (path == head or is_embedding(module)):
                continue
            for part in ("weight", "bias"):
                names = [name for spelling in _SPELLINGS if keys[path] + (name := f"{spelling}{part}") in tensors]
                for name in names[:1]:
                    _check(path, module, part, tensors[keys[path] + name], where)
                    if path not in copied:
                        self.found.setdefault(path, {})[part] = name
                        self.tensors[f"{path}.{part}"] = tensors[keys[path] + name]
        if head is not None and head not in copied and self.found.get(head, {}).get("weight") == "weight" and len(self.found) == 1:
            del self.found[head]  # peft writes a head beside the adapter only together with the embedding: refuse it

    def surplus(self, expected: Collection[str]) -> list[str]:
        """Return the keys found that are not the adapter's own."""
        return [key for path, names in self.found.items() for name in names.values() if (key := self.keys[path] + name) not in expected]

    def replacements(self, expected: Collection[str], notes: list[str]) -> Iterator[tuple[Site, SidePath]]:
        """Yield frozen replacements of the weights that differ from the base's; note each."""
        for path, names in self.found.items():
            names = {part: name for part, name in names.items() if self.keys[path] + name not in expected}
            module = self.modules[path]
            values = {part: self.tensors[f"{path}.{part}"] for part in names}
            own = {part: dense(module) if part == "weight" else module._parameters[part] for part in names}
            if all(here is not None and torch.equal(values[part].to(here), here) for part, here in own.items()):
                continue
            yield Site(path, module), ReplacedWeight(module, values, names)
            tied = [other for other in tied_to(self.model, path) if "weight" in names and other not in self.found]
            where = f"{path} (and {listed(tied)}, tied to it)" if tied else path
            notes.append(f"{where}: the file's weight (a resized vocabulary) replaces the base's while the adapter is active")
            for other in tied:
                yield Site(other, self.modules[other]), ReplacedWeight(self.modules[other], {"weight": values["weight"]}, {})


def _check(path: str, module: nn.Module, part: str, tensor: Tensor, where: Path) -> None:
    own = dense(module) if part == "weight" else module._parameters.get(part)
    if own is None or own.shape != tensor.shape:
        rows = tensor.shape[0] if tensor.dim() else 0
        raise AdapterError(
            f"{where}: {path}.{part} has shape {list(tensor.shape)}, here it is {None if own is None else list(own.shape)}",
            f"the vocabulary was resized before training: model.resize_token_embeddings({rows}, mean_resizing=False) first",
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise AdapterError(f"{where}: {path}.{part} is not floating-point and finite")
