"""Merging that can be taken back: merged parameters stand in the place of the base's own, which are kept and put back as they were."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from byway.compat.peft.state import finite, layer_of
from byway.core.copies import TrainedCopy
from byway.core.folding import own_tensors
from byway.core.merge import merge
from byway.core.slots import SidePath, base_modules, slot_of
from byway.core.weights import is_quantized
from byway.errors import AdapterError, BywayError, NotMergeable

__all__ = ["broken", "merge_for_good", "merge_layer", "mergeable", "merged_somewhere", "unmerge_all", "unmerge_layer"]


def broken(name: str) -> AdapterError:
    """What is raised when a merged weight would not be finite."""
    return AdapterError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def mergeable(module: nn.Module, name: str) -> list[SidePath]:
    """What adapter `name` has at this module that is folded into its parameters; copies of whole modules stay beside it."""
    slot = slot_of(module)
    return [] if slot is None else [side for own, side in slot.sides() if own == name and not isinstance(side, TrainedCopy)]


@torch.no_grad()
def merge_layer(module: nn.Module, names: Sequence[str] | None = None, *, safe: bool = False) -> bool:
    """Merge adapters (default: the active ones) into one module; returns whether there was anything to merge.

    Parameters are replaced, not written, so that what shares the base's (a tied head) keeps its own, and so does the base.
    """
    layer, slot = layer_of(module), slot_of(module)
    wanted = [name for name in (layer.active if names is None else names) if mergeable(module, name)]
    new = [name for name in wanted if name not in layer.merged]
    if not new or slot is None:
        return False
    if is_quantized(module):
        raise NotMergeable("a 4- or 8-bit weight cannot be merged and taken back without loss", "use merge_and_unload()")
    tensors = own_tensors(module)
    for name in new:
        for side in mergeable(module, name):
            tensors = side.fold(tensors)
        if safe and not finite(tensors):
            raise broken(name)
    for key, tensor in tensors.items():
        own = module._parameters[key]
        if own is None:
            raise NotMergeable(f"{type(module).__name__} has no {key} to merge into")
        layer.originals.setdefault(key, own)
        module._parameters[key] = nn.Parameter(tensor.to(own.dtype).contiguous(), requires_grad=False)
    layer.merged.extend(new)
    layer.apply(slot)
    return True


def unmerge_layer(module: nn.Module) -> None:
    """Put the module's own parameters back, bit for bit."""
    layer, slot = layer_of(module), slot_of(module)
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    for key, own in layer.originals.items():
        there = module._parameters[key]
        module._parameters[key] = own if there is None or there.device == own.device else nn.Parameter(own.to(there.device), False)
    layer.originals.clear()
    layer.merged.clear()
    if slot is not None:
        layer.apply(slot)


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    return (module for _, module in base_modules(model) if slot_of(module) is not None)


def merged_somewhere(model: nn.Module) -> bool:
    """Whether any module is merged now."""
    return any(layer_of(module).merged for module in _adapted(model))


def unmerge_all(model: nn.Module) -> None:
    """Take back every merge in `model`."""
    for module in list(_adapted(model)):
        if layer_of(module).merged:
            unmerge_layer(module)


def merge_for_good(model: nn.Module, name: str, *, safe: bool) -> None:
    """Fold adapter `name` into the base and detach it (:func:`byway.merge`).

    Raises:
        AdapterError: a merged weight would not be finite; the model is unchanged.
    """
    try:
        merge(model, name)
    except NotMergeable:
        raise
    except BywayError as error:
        if "not finite" in error.message:
            raise broken(name) from error
        raise
