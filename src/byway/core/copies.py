"""Train tensors of the base as copies next to it, so that disabling, switching and detaching adapters stay exact.

* :class:`Copy` replaces a whole module; :class:`TrainedCopy` is the copy of a task head or an output head.
* :class:`TrainedBias` trains b' next to b: out + (b' − b). A bias that several modules share stays one tensor.

Chosen rows of an embedding or a head are in :mod:`byway.core.token_rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import SLOT, ModuleRef, SidePath, Site, base_modules
from byway.core.weights import is_conv, is_embedding, is_linear, is_norm, is_quantized, odd_output, plain, widened
from byway.errors import listed

__all__ = [
    "Copy", "TrainedBias", "TrainedCopy", "bare_copy", "biases", "ends_of", "held_biases", "holders", "tied_biases", "tied_note", "tied_to",
    "ties", "untied_note", "untrained_biases",
]  # fmt: skip


class Copy(SidePath):
    """y = copy(x): a trained copy of a whole module computes its output; the module itself is unchanged.

    The copy's floating-point tensors are float32, or float64 if the base is. Inputs are cast to it, the output back.

    Args:
        module: the module to copy.
        shared: the shared state of one attach, if copies of modules with the same tensor are to share one, too.
    """

    def __init__(self, module: nn.Module, shared: dict[Any, Any] | None = None) -> None:
        super().__init__()
        bare = bare_copy(module)
        kept = next((p.dtype for p in bare.parameters() if p.is_floating_point()), torch.float32)
        self.base_dtype = torch.float32 if widened(module) else kept
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in bare.parameters()) else torch.float32
        self.copy = bare.to(self.dtype).requires_grad_(True)
        if shared is not None:
            self._share(module, shared)

    def _share(self, module: nn.Module, shared: dict[Any, Any]) -> None:
        """Use the tensors of other copies where the base shares them: tied tensors stay one tensor."""
        twins = dict(base_modules(self.copy))
        for path, part in base_modules(module):
            for name, parameter in part._parameters.items():
                mine = twins[path]._parameters.get(name)
                if parameter is not None and mine is not None:
                    # the value holds the base's tensor itself, so that its id is not reused
                    twins[path]._parameters[name] = shared.setdefault((Copy, id(parameter)), (parameter, mine))[1]

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        surplus = inputs.pop("*", ())
        if surplus:
            raise TypeError(f"{type(module).__name__} takes a variable number of arguments, so it cannot be trained as a copy")
        # return the dtype that the module itself would: an embedding's is its weight's, whatever a mask's is (OPT)
        floating = (v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
        given = self.base_dtype if is_embedding(module) else next(floating, self.base_dtype)
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
    """y = f(x) + (b' − b): trains the bias b of a module as b'.

    Args:
        module: a module that adds its bias last.
        adapted: True if a file stores the module as an adapted one.
        shared: the shared state of one attach, in which modules with the same bias find the same b'.
    """

    def __init__(self, module: nn.Module, *, adapted: bool, shared: dict[Any, Any] | None = None) -> None:
        super().__init__()
        base = module.bias
        if not isinstance(base, Tensor):
            raise TypeError(f"{type(module).__name__} has no bias")
        self.base = ModuleRef(module)
        own = nn.Parameter(base.detach().clone().to(torch.promote_types(base.dtype, torch.float32)))
        # the value holds the base's tensor itself, so that its id is not reused
        self.bias = own if shared is None else shared.setdefault((TrainedBias, id(base)), (base, own))[1]
        # peft stores the bias of a module that it wraps under `base_layer`
        self.peft_names = {"bias": "base_layer.bias" if adapted else "bias"}
        self.spatial = len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0
        self.channels_first = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase)

    def delta(self) -> Tensor:
        """Return b' − b, (out,)."""
        base = self.base.module.bias
        return self.bias - base if isinstance(base, Tensor) else self.bias

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        delta = self.delta().to(out.dtype)
        behind = out.ndim - 2 if self.channels_first else self.spatial  # dimensions after that of the channels
        return out + delta.reshape(*delta.shape, *(1,) * behind)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # add the difference, so that a bias which another side path has folded in is kept
        return tensors | {"bias": tensors["bias"] + self.delta().detach().to(tensors["bias"].dtype)}


def biases(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that add a bias of their own last, by path: b' − b can be added to their output.

    The parts of an ``nn.MultiheadAttention`` are left out: it reads their tensors and never calls them.
    """
    found: dict[str, nn.Module] = {}
    for path, module in base_modules(model):
        adds = is_linear(module) or is_conv(module) or is_norm(module) or isinstance(module, nn.Bilinear | nn.modules.conv._ConvTransposeNd)
        direct = isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)
        if adds and not direct and isinstance(module._parameters.get("bias"), Tensor) and not odd_output(module):
            found[path] = module
    return found


def tied_biases(model: nn.Module, paths: Collection[str]) -> list[Site]:
    """Return the modules that add one of the biases of those at `paths`: a shared bias is one tensor."""
    adding = biases(model)
    chosen = {id(module._parameters["bias"]) for path, module in adding.items() if path in paths}
    return [Site(path, module) for path, module in adding.items() if id(module._parameters["bias"]) in chosen]


def held_biases(model: nn.Module) -> list[str]:
    """Return the modules that hold the bias of another one without adding it, by path.

    ``BertLMPredictionHead`` has the bias of its decoder under a second name, which files use.
    """
    adding = biases(model)
    own = {id(module._parameters["bias"]) for module in adding.values()}
    return [path for path, module in base_modules(model) if path not in adding and id(module._parameters.get("bias")) in own]


def untrained_biases(model: nn.Module) -> list[str]:
    """Return a note on biases inside modules (BEiT's positions, a router's), which no side path can change."""
    known = {id(module._parameters["bias"]) for module in biases(model).values()}
    inside = [
        f"{path}.{name}"
        for path, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and "bias" in name and id(parameter) not in known
    ]
    return [f"left out, because they are added inside their modules: {listed(inside, 3)}"] if inside else []


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


def holders(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Return the id of each parameter that several modules hold → (module path, name in the module) of each."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((path, name))
    return {key: places for key, places in found.items() if len(places) > 1}


def ends_of(model: nn.Module, places: Sequence[tuple[str, str]]) -> list[str]:
    """Return the modules among `places` (path, name of the tensor) that read a shared tensor, not only hold it."""
    held = set(held_biases(model))
    return [path for path, name in places if name != "bias" or path not in held]


def tied_note(model: nn.Module, site: Site) -> str:
    """Return a note that training the module of `site` as a copy unties its weight; ``""`` if nothing is tied."""
    others = tied_to(model, site.path)
    if not others:
        return ""
    return f"{site.path} shares its weight with {', '.join(others)}: the trained copy is untied, the base's weight is unchanged"


def untied_note(path: str, others: Sequence[str]) -> str:
    """Return the note of a merge that gave the module at `path` its own weight."""
    return f"{path} was tied to {', '.join(others)}; it has its own weight now"
