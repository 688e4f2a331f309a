"""What peft's code expects of an adapted layer, on top of a module that stays what it is.

peft replaces a layer by a wrapper; here the layer keeps its tensors, its place and its keys, and side paths hang beside it. Code
that reaches into peft's wrapper (``layer.lora_A["default"].weight``, ``layer.scaling``, ``layer.base_layer``, ``layer.merged``)
finds these names here: an adapted module gets a subclass of its own class with them, made on the fly, and its own class back when the
last adapter goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from byway.compat.peft.state import _STATE, Layer, layer_of
from byway.core.copies import Copy, TrainedBias, TrainedCopy, TrainedRows
from byway.core.folding import own_tensors
from byway.core.slots import SLOT, SidePath, Slot, slot_of
from byway.core.weights import features, is_conv, is_embedding, is_linear, is_transposed
from byway.methods.lowrank.sides import LowRank

__all__ = ["AdaptedLayer", "AuxiliaryWrapper", "ByName", "dress", "first_parts", "shown", "undress"]

_LIVE_MODULES = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
"""Names that peft shortens in files: as in the file → as in the model."""


def shown(side: SidePath) -> dict[str, str]:
    """Own tensor name → the name in peft's live modules, ``{}`` marking where the adapter's name goes."""
    if isinstance(side, Copy):
        # in files a copy has the module's own names, or another word before them (a norm's)
        word = "modules_to_save." if isinstance(side, TrainedCopy) else next(iter(side.export())).partition(".")[0] + "."
        return {f"copy.{own}": f"{word}{{}}.{own}" for own in side.copy.state_dict()}
    if isinstance(side, TrainedBias):
        return {}
    if isinstance(side, TrainedRows):
        return {"rows": "token_adapter.trainable_tokens_delta.{}"}
    return {own: _insert(_LIVE_MODULES.get(theirs, theirs)) for own, theirs in side.peft_names.items()}


def _insert(name: str) -> str:
    head, dot, rest = name.partition(".")
    return f"{head}.{{}}{dot}{rest}"


def first_parts(side: SidePath) -> dict[str, list[tuple[str, str]]]:
    """Attribute of the layer → [(name of the tensor below it, own name)], for the tensors that `side` really has."""
    found: dict[str, list[tuple[str, str]]] = {}
    own_names = {name for name, _ in side.named_parameters()} | {name for name, _ in side.named_buffers()}
    for own, pattern in shown(side).items():
        if own in own_names and not isinstance(side, TrainedCopy | TrainedRows):
            head, _, rest = pattern.partition(".{}")
            found.setdefault(head, []).append((rest.lstrip("."), own))
    return found


class ByName(MutableMapping[str, Any]):
    """A live mapping from adapter names, that can also be read as attributes, like ``nn.ModuleDict``."""

    def __init__(self, read: Callable[[], dict[str, Any]], write: Callable[[str, Any], None] | None = None) -> None:
        self._read = read
        self._write = write

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._write is None:
            raise TypeError("this is a view: change the tensors in it")
        self._write(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("this is a view: delete_adapter takes an adapter away")

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._read():
            raise AttributeError(name)
        return self._read()[name]

    def __repr__(self) -> str:
        return repr(self._read())


class AdaptedLayer(nn.Module):
    """peft's names on an adapted module; the first base of the subclass that :func:`dress` makes."""

    adapter_layer_names: Any
    other_param_names: Any

    def _slot(self) -> Slot | None:
        return slot_of(self)

    def _sides(self) -> list[tuple[str, SidePath]]:
        slot = slot_of(self)
        return [] if slot is None else list(slot.sides())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are set, as in peft also those that this module has no part of."""
        layer = layer_of(self)
        return _copied(self, layer) if isinstance(self, AuxiliaryWrapper) else list(layer.active)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return layer_of(self).disabled

    @property
    def merged(self) -> bool:
        return bool(layer_of(self).merged)

    @property
    def merged_adapters(self) -> list[str]:
        return layer_of(self).merged

    @property
    def base_layer(self) -> nn.Module:
        """The module as it was: its class, its very tensors, and nothing beside it."""
        twin = object.__new__(plain_class(self))
        vars(twin).update({k: v for k, v in vars(self).items() if k not in (_STATE, "forward")})
        vars(twin)["_modules"] = {name: child for name, child in self._modules.items() if name != SLOT}
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
            vars(twin)[hooks] = type(vars(self)[hooks])()
        return twin

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def _all_available_adapter_names(self) -> list[str]:
        return sorted({name for name, _ in self._sides()})

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging `adapter` would add to the weight."""
        before = own_tensors(self)
        after = dict(before)
        for name, side in self._sides():
            after = side.fold(after) if name == adapter else after
        return after["weight"] - before["weight"]

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put merged parameters in the place of the module's own."""
        from byway.compat.peft.merging import merge_layer

        merge_layer(self, adapter_names, safe=safe_merge)

    def unmerge(self) -> None:
        """Put the module's own parameters back."""
        from byway.compat.peft.merging import unmerge_layer

        unmerge_layer(self)

    def enable_adapters(self, enabled: bool) -> None:
        layer, slot = layer_of(self), slot_of(self)
        layer.disabled = not enabled
        if slot is not None:
            for name, side in slot.sides():
                side.requires_grad_(enabled and name in layer.active)
            layer.apply(slot)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        layer, slot = layer_of(self), slot_of(self)
        layer.active = names
        if slot is not None:
            for name, side in slot.sides():
                side.requires_grad_(name in names and not inference_mode)
            layer.apply(slot)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self._view(name)

    def _view(self, name: str) -> Any:
        sides = [] if name.startswith("_") and name != "_adapters" else self._sides()
        if name in ("adapter_layer_names", "other_param_names"):
            names = dict.fromkeys(head for _, side in sides for head in first_parts(side))
            return tuple(names) if name == "adapter_layer_names" else tuple(n for n in _NUMBERS if any(_has_scale(s) for _, s in sides))
        if any(name in first_parts(side) for _, side in sides):
            return ByName(lambda: {own: _part(side, name, self) for own, side in self._sides() if name in first_parts(side)})
        if name in _NUMBERS and any(_has_scale(side) for _, side in sides):
            return _numbers(self, name)
        if name == "lora_embedding_A" and any(isinstance(side, LowRank) for _, side in sides):
            return {}
        if name in ("modules_to_save", "original_module", "token_adapter", "_adapters") and isinstance(self, AuxiliaryWrapper):
            return _auxiliary(self, name)
        if name in ("in_features", "out_features") and sides and (is_linear(self) or is_conv(self) or is_embedding(self)):
            return features(self)[name == "out_features"]
        if name == "fan_in_fan_out" and sides:
            return is_transposed(self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def set_scale(self, adapter: str, scale: float) -> None:
        """The update of `adapter` counts `scale` times what it counted when it was made."""
        if adapter in layer_of(self).scales:
            self.scaling[adapter] = scale * layer_of(self).scales[adapter]

    def scale_layer(self, scale: float) -> None:
        for adapter in layer_of(self).active:
            if scale != 1 and adapter in layer_of(self).scales:
                self.scaling[adapter] = self.scaling[adapter] * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in layer_of(self).active:
            if adapter in layer_of(self).scales:
                self.scaling[adapter] = layer_of(self).scales[adapter] if scale is None else self.scaling[adapter] / scale

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (plain_class(self), isinstance(self, AuxiliaryWrapper)), self.__getstate__()


class AuxiliaryWrapper(AdaptedLayer):
    """A module that is trained whole, or whose rows are, beside the base's."""


_NUMBERS = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora")


def _has_scale(side: SidePath) -> bool:
    return isinstance(side, LowRank)


def _numbers(module: AdaptedLayer, name: str) -> ByName:
    def low_rank() -> dict[str, LowRank]:
        return {own: side for own, side in module._sides() if isinstance(side, LowRank)}

    def write(adapter: str, value: Any) -> None:
        low_rank()[adapter].scale = float(value)

    readers: Mapping[str, Callable[[str, LowRank], Any]] = {
        "r": lambda _, side: side.rank,
        "lora_alpha": lambda own, side: layer_of(module).scales.get(own, side.scale) * side._divisor(side.rank),
        "scaling": lambda _, side: side.scale,
        "lora_dropout": lambda _, side: nn.Identity() if side.dropout is None else side.dropout,
        "use_rslora": lambda _, side: side.rank_stabilized,
    }
    return ByName(lambda: {own: readers[name](own, side) for own, side in low_rank().items()}, write if name == "scaling" else None)


def _part(side: SidePath, head: str, module: nn.Module) -> Any:
    """The parameter itself, or a module with it: a linear map where the factor is one, so that it can also be called."""
    own = dict(side.named_parameters()) | dict(side.named_buffers())
    parts = {rest: own[name] for rest, name in first_parts(side)[head]}
    if "" in parts:
        return parts[""]
    weight = parts["weight"]
    view = object.__new__(nn.Linear if weight.dim() == 2 else nn.Module)
    nn.Module.__init__(view)
    view._parameters.update({"weight": None, "bias": None})
    for name, tensor in parts.items():
        (view._parameters if isinstance(tensor, nn.Parameter) else view._buffers)[name] = tensor  # pyright: ignore[reportArgumentType]
    if weight.dim() == 2:
        vars(view).update(out_features=weight.shape[0], in_features=weight.shape[1])
    return view


def _copied(module: AdaptedLayer, layer: Layer) -> list[str]:
    there = {name for name, side in module._sides() if isinstance(side, TrainedCopy | TrainedRows)}
    return [name for name in layer.active if name in there]


class _TokenAdapter:
    """peft's ``token_adapter`` of an embedding with trained rows."""

    def __init__(self, module: AdaptedLayer) -> None:
        def rows() -> dict[str, TrainedRows]:
            return {name: side for name, side in module._sides() if isinstance(side, TrainedRows)}

        self.trainable_tokens_delta = ByName(lambda: {name: side.rows for name, side in rows().items()})
        self.trainable_tokens_original = ByName(lambda: {n: _weight(module)[side.indices] for n, side in rows().items()})
        self.token_indices = ByName(lambda: {name: side.indices.tolist() for name, side in rows().items()})


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()


def _auxiliary(module: AdaptedLayer, name: str) -> Any:
    copies = ByName(lambda: {own: side.copy for own, side in module._sides() if isinstance(side, TrainedCopy)})
    rows = any(isinstance(side, TrainedRows) for _, side in module._sides())
    if name == "_adapters":
        return {own for own, _ in module._sides()}
    if (name == "token_adapter") != rows and name != "original_module":
        raise AttributeError(name)
    return {"modules_to_save": copies, "original_module": module.base_layer, "token_adapter": _TokenAdapter(module)}[name]


@cache
def _dressed_class(cls: type[nn.Module], whole: bool) -> type[nn.Module]:
    """The subclass of `cls` with peft's names; one for each class."""
    mixin = AuxiliaryWrapper if whole else AdaptedLayer
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without peft's names."""
    return type(module).__bases__[1] if isinstance(module, AdaptedLayer) else type(module)


def _rebuild(cls: type[nn.Module], whole: bool) -> nn.Module:
    return object.__new__(_dressed_class(cls, whole))


def dress(module: nn.Module) -> None:
    """Give `module` peft's names."""
    sides = [] if (slot := slot_of(module)) is None else [side for _, side in slot.sides()]
    own = [side for side in sides if first_parts(side)]
    whole = not own and any(isinstance(side, TrainedCopy | TrainedRows) for side in sides)
    if not own and not whole:
        return
    cls = plain_class(module)
    module.__class__ = _dressed_class(cls, whole)
    layer = layer_of(module)
    for name, side in [] if slot is None else slot.sides():
        if isinstance(side, LowRank):
            layer.scales.setdefault(name, side.scale)


def undress(module: nn.Module) -> None:
    """Give `module` its own class back."""
    vars(module).pop(_STATE, None)
    if isinstance(module, AdaptedLayer):
        module.__class__ = plain_class(module)  # pyright: ignore[reportAttributeAccessIssue]
