"""Train tensors of the base as copies next to it, so that disabling, switching and detaching adapters stay exact.

* :class:`Copy` replaces a whole module; :class:`TrainedCopy` is the copy of a task head or an output head.
* :class:`TrainedBias` trains b' next to b: out + (b' − b).

Chosen rows of an embedding or a head are in :mod:`byway.core.token_rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import SLOT, ModuleRef, SidePath, Site, base_modules
from byway.core.weights import is_quantized, plain, widened

__all__ = [
    "Copy", "TrainedBias", "TrainedCopy", "bare_copy", "tied_note", "tied_to", "ties", "untied_note",
]  # fmt: skip


class Copy(SidePath):
    """y = copy(x): a trained copy of a whole module computes its output; the module itself is unchanged.

    The copy's floating-point tensors are float32, or float64 if the base is. Inputs are cast to it, the output back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        bare = bare_copy(module)
        kept = next((p.dtype for p in bare.parameters() if p.is_floating_point()), torch.float32)
        self.base_dtype = torch.float32 if widened(module) else kept
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in bare.parameters()) else torch.float32
        self.copy = bare.to(self.dtype).requires_grad_(True)

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        surplus = inputs.pop("*", ())
        if surplus:
            raise TypeError(f"{type(module).__name__} takes a variable number of arguments, so it cannot be trained as a copy")
        # an embedding gets integers: return the dtype that the module itself would
        given = next((v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()), self.base_dtype)
        if given == self.dtype:
            return self.copy(**inputs)
        return _cast(self.copy(**{name: _cast(value, self.dtype) for name, value in inputs.items()}), given)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.copy.state_dict()
        return {name: own[name].detach().clone() for name in tensors}


class TrainedCopy(Copy):
    """Copy of a module to save (a task head, an output head); files hold it under the module's own tensor names."""

    def export(self) -> dict[str, Tensor]:
        return dict(self.copy.state_dict())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of `value` to `dtype`, also inside a tuple."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(part, dtype) for part in value) if type(value) is tuple else value


def bare_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy without slots, hooks and instance ``forward`` methods; a quantized map is dequantized."""
    if is_quantized(module):
        return plain(module)
    twin = copy.deepcopy(module)
    for _, part in base_modules(twin):
        part._modules.pop(SLOT, None)
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


class TrainedBias(SidePath):
    """y = f(x) + (b' − b): trains the bias b of a module as b'."""

    def __init__(self, module: nn.Module, *, adapted: bool) -> None:
        super().__init__()
        base = module.bias
        if not isinstance(base, Tensor):
            raise TypeError(f"{type(module).__name__} has no bias")
        self.base = ModuleRef(module)
        self.bias = nn.Parameter(base.detach().clone().to(torch.promote_types(base.dtype, torch.float32)))
        # peft stores the bias of a module that it wraps under `base_layer`
        self.peft_names = {"bias": "base_layer.bias" if adapted else "bias"}
        self.channels_first = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.GroupNorm | nn.modules.batchnorm._NormBase)

    def delta(self) -> Tensor:
        """Return b' − b, (out,)."""
        base = self.base.module.bias
        return self.bias - base if isinstance(base, Tensor) else self.bias

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + self.delta().to(out.dtype).reshape(-1, *(1,) * (out.ndim - 2 if self.channels_first else 0))

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # add the difference, so that a bias which another side path has folded in is kept
        return tensors | {"bias": tensors["bias"] + self.delta().detach().to(tensors["bias"].dtype)}


def ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return module path → other modules that share its ``weight``, for every module with a tied weight."""
    groups: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), []).append(path)
    return {path: tuple(other for other in group if other != path) for group in groups.values() if len(group) > 1 for path in group}


def tied_to(model: nn.Module, path: str) -> tuple[str, ...]:
    """Return the paths of the other modules that share the ``weight`` of the module at `path`."""
    return ties(model).get(path, ())


def tied_note(model: nn.Module, site: Site) -> str:
    """Return a note that training the module of `site` as a copy unties its weight; ``""`` if nothing is tied."""
    others = tied_to(model, site.path)
    if not others:
        return ""
    return f"{site.path} shares its weight with {', '.join(others)}: the trained copy is untied, the base's weight is unchanged"


def untied_note(path: str, others: Sequence[str]) -> str:
    """Return the note of a merge that gave the module at `path` its own weight."""
    return f"{path} was tied to {', '.join(others)}; it has its own weight now"
