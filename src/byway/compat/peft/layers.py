"""peft's view of an adapted layer, on top of a module that stays what it is.

peft replaces a layer by a wrapper; here the layer keeps its tensors, its place and its keys. Code that reaches into
peft's wrapper (``layer.lora_A["default"].weight``, ``layer.scaling``, ``layer.base_layer``, ``layer.merged``) works all
the same: an adapted module gets a subclass of its own class with these names, until its last adapter is deleted.

Tensors get peft's names too, while the model's own keys do not change: ``lin.weight`` → ``lin.base_layer.weight`` if
side paths are attached to it; ``lin.byway.default.lora_A`` → ``lin.lora_A.default.weight``;
``head.byway.default.copy.weight`` → ``head.modules_to_save.default.weight``, and the base's own head →
``head.original_module.weight``; side paths of the whole model → ``prompt_encoder.default…``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.copies import Copy, TrainedBias, TrainedCopy
from byway.core.folding import own_tensors
from byway.core.slots import SLOT, SidePath, slot_of, slots
from byway.core.token_rows import TiedRows, TrainedRows
from byway.core.weights import features, is_conv, is_embedding, is_linear, is_quantized, is_transposed
from byway.errors import AdapterError, NotMergeable
from byway.methods.lowrank.sides import LowRank, divisor

__all__ = ["AdaptedLayer", "AuxiliaryWrapper", "Layer", "broken", "dress", "first_parts", "layer_of", "peft_names", "undress"]

_STATE = "_byway_peft_layer"
_OF_SIDE_PATH = re.compile(rf"((?:.*?\.)?{SLOT}\.[^.]+\.)(.*)")
_LIVE = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
"""Names that peft shortens in files: name in a file → name in a module."""


def broken(name: str) -> AdapterError:
    """Return the error for merged weights that are not finite."""
    return AdapterError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


@dataclass(eq=False)
class Layer:
    """The record that peft's interface keeps of one adapted module."""

    module: nn.Module
    active: list[str] = field(default_factory=list)
    """The adapters that are set; as in peft also those without a part in this module."""
    disabled: bool = False
    merged: list[str] = field(default_factory=list)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """The base's own parameters, while merged ones take their place."""
    scales: dict[str, float] = field(default_factory=dict)
    """The scale of each adapter when it was attached."""

    def sides(self) -> list[tuple[str, SidePath]]:
        """Return (adapter name, side path) in attach order."""
        slot = slot_of(self.module)
        return [] if slot is None else list(slot.sides())

    def apply(self) -> None:
        """Activate exactly the side paths that peft would."""
        slot = slot_of(self.module)
        if slot is not None and self.disabled:
            slot.activate(())
        elif slot is not None:
            copies = {name for name, side in slot.sides() if isinstance(side, TrainedCopy)}
            slot.activate(tuple(name for name in self.active if not self.merged or name in copies))

    def mergeable(self, name: str) -> list[SidePath]:
        """Return the side paths of adapter `name` that fold into the parameters: all but copies of whole modules."""
        return [side for own, side in self.sides() if own == name and not isinstance(side, TrainedCopy)]

    @torch.no_grad()
    def merge(self, names: Sequence[str] | None = None, *, safe: bool = False) -> bool:
        """Merge adapters (default: the active ones); return True if there was anything to merge.

        Parameters are replaced, not overwritten: whatever shares the base's (a tied head) keeps the base's.

        Raises:
            NotMergeable: the base is quantized, or lacks the parameter to merge into.
            AdapterError: `safe`, and a merged parameter would not be finite.
        """
        new = [name for name in (self.active if names is None else names) if self.mergeable(name) and name not in self.merged]
        if not new:
            return False
        if is_quantized(self.module):
            raise NotMergeable("a 4- or 8-bit weight cannot be merged and restored without loss", "use merge_and_unload()")
        tensors = own_tensors(self.module)
        for name in new:
            for side in self.mergeable(name):
                tensors = side.fold(tensors)
            if safe and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise broken(name)
        for key, tensor in tensors.items():
            own = self.module._parameters[key]
            if own is None:
                raise NotMergeable(f"{type(self.module).__name__} has no {key} to merge into")
            self.originals.setdefault(key, own)
            self.module._parameters[key] = nn.Parameter(tensor.to(own.dtype).contiguous(), requires_grad=False)
        self.merged.extend(new)
        self.apply()
        return True

    def unmerge(self) -> None:
        """Put the module's own parameters back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for key, own in self.originals.items():
            now = self.module._parameters[key]
            self.module._parameters[key] = own if now is None or now.device == own.device else nn.Parameter(own.to(now.device), False)
        self.originals.clear()
        self.merged.clear()
        self.apply()


def layer_of(module: nn.Module) -> Layer:
    """Return the record of an adapted module, created on first use."""
    return vars(module).setdefault(_STATE, Layer(module))


class ByName(MutableMapping[str, Any]):
    """A live mapping from adapter names; entries can also be read as attributes, as with ``nn.ModuleDict``."""

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
        raise TypeError("this is a view: use delete_adapter to remove an adapter")

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


_NUMBERS: dict[str, Callable[[Layer, str, LowRank], Any]] = {
    "r": lambda layer, name, side: side.rank,
    "lora_alpha": lambda layer, name, side: layer.scales.get(name, side.scale) * divisor(side.rank, side.rank_stabilized),
    "scaling": lambda layer, name, side: side.scale,
    "lora_dropout": lambda layer, name, side: nn.Identity() if side.dropout is None else side.dropout,
    "use_rslora": lambda layer, name, side: side.rank_stabilized,
}
"""Attribute of peft's LoRA layers → (record of the layer, adapter name, side path) → its value for that adapter."""


class AdaptedLayer(nn.Module):
    """peft's names on an adapted module; the first base of the subclass that :func:`dress` makes."""

    adapter_layer_names: Any
    other_param_names: Any

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are set, as in peft also those without a part in this module."""
        return list(layer_of(self).active)

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
        """The original module: its class and its very tensors, without side paths."""
        twin = object.__new__(_plain_class(self))
        vars(twin).update({key: value for key, value in vars(self).items() if key not in (_STATE, "forward")})
        vars(twin)["_modules"] = {name: child for name, child in self._modules.items() if name != SLOT}
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
            vars(twin)[hooks] = type(vars(self)[hooks])()
        return twin

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def _all_available_adapter_names(self) -> list[str]:
        return sorted({name for name, _ in layer_of(self).sides()})

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging `adapter` would add to the weight."""
        before = after = own_tensors(self)
        for name, side in layer_of(self).sides():
            after = side.fold(dict(after)) if name == adapter else after
        return after["weight"] - before["weight"]

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Replace the module's parameters by merged ones."""
        layer_of(self).merge(adapter_names, safe=safe_merge)

    def unmerge(self) -> None:
        """Put the module's own parameters back."""
        layer_of(self).unmerge()

    def enable_adapters(self, enabled: bool) -> None:
        layer = layer_of(self)
        layer.disabled = not enabled
        for name, side in layer.sides():
            side.requires_grad_(enabled and name in layer.active)
        layer.apply()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        layer = layer_of(self)
        layer.active = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, side in layer.sides():
            side.requires_grad_(name in layer.active and not inference_mode)
        layer.apply()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the update of `adapter` to `scale` times its strength when it was attached."""
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") and name != "_adapters":
                raise
            return self._view(name)

    def _view(self, name: str) -> Any:
        """Return an attribute of peft's layers that this module computes from its side paths."""
        layer = layer_of(self)
        sides = [side for _, side in layer.sides()]
        low_rank = any(isinstance(side, LowRank) for side in sides)
        if name == "adapter_layer_names":
            return tuple(dict.fromkeys(head for side in sides for head in first_parts(side)))
        if name == "other_param_names":
            return tuple(_NUMBERS) if low_rank else ()
        if any(name in first_parts(side) for side in sides):
            return ByName(lambda: {own: _part(side, name) for own, side in layer.sides() if name in first_parts(side)})
        if name in _NUMBERS and low_rank:

            def of_kind() -> dict[str, LowRank]:
                return {own: side for own, side in layer.sides() if isinstance(side, LowRank)}

            def write(adapter: str, value: Any) -> None:
                of_kind()[adapter].scale = float(value)

            read = _NUMBERS[name]
            return ByName(lambda: {own: read(layer, own, side) for own, side in of_kind().items()}, write if name == "scaling" else None)
        if name == "lora_embedding_A" and low_rank:
            return {}
        if name in ("in_features", "out_features") and sides and (is_linear(self) or is_conv(self) or is_embedding(self)):
            return features(self)[name == "out_features"]
        if name == "fan_in_fan_out" and sides:
            return is_transposed(self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_plain_class(self), isinstance(self, AuxiliaryWrapper)), self.__getstate__()


class AuxiliaryWrapper(AdaptedLayer):
    """A module that is trained whole, or some rows of it, as a copy."""

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are set and have a part in this module."""
        there = {name for name, side in layer_of(self).sides() if isinstance(side, TrainedCopy | TrainedRows)}
        return [name for name in layer_of(self).active if name in there]

    @property
    def weight(self) -> Any:
        """The weight that acts: code that reads a head's weight instead of calling it trains the copy, too."""
        return self._acting("weight")

    @property
    def bias(self) -> Any:
        return self._acting("bias")

    def _acting(self, name: str) -> Any:
        own = super().__getattr__(name)
        for adapter, side in layer_of(self).sides():
            if layer_of(self).disabled or adapter not in layer_of(self).active or own is None:
                continue
            if isinstance(side, TrainedCopy):
                return side.copy.get_parameter(name).to(own.dtype)
            if isinstance(side, TiedRows) and name == "weight":
                return own.index_copy(0, side.source.indices, side.source.rows.to(own.dtype))
        return own

    def _view(self, name: str) -> Any:
        layer = layer_of(self)
        has_rows = any(isinstance(side, TrainedRows) for _, side in layer.sides())
        if name == "_adapters":
            return {own for own, _ in layer.sides()}
        if name == "original_module":
            return self.base_layer
        if name == "modules_to_save" and not has_rows:
            return ByName(lambda: {own: side.copy for own, side in layer.sides() if isinstance(side, TrainedCopy)})
        if name == "token_adapter" and has_rows:

            def rows(read: Callable[[TrainedRows], Any]) -> ByName:
                return ByName(lambda: {own: read(side) for own, side in layer.sides() if isinstance(side, TrainedRows)})

            weight = self._parameters["weight"]
            assert weight is not None
            return SimpleNamespace(
                trainable_tokens_delta=rows(lambda side: side.rows),
                trainable_tokens_original=rows(lambda side: weight.detach()[side.indices]),
                token_indices=rows(lambda side: side.indices.tolist()),
            )
        return super()._view(name)


def _part(side: SidePath, head: str) -> Any:
    """Return the parameter itself, or a module that holds it: a callable ``nn.Linear`` if the factor is a matrix."""
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


@cache
def _dressed_class(cls: type[nn.Module], whole: bool) -> type[nn.Module]:
    mixin = AuxiliaryWrapper if whole else AdaptedLayer
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _plain_class(module: nn.Module) -> type[nn.Module]:
    return type(module).__bases__[1] if isinstance(module, AdaptedLayer) else type(module)


def _rebuild(cls: type[nn.Module], whole: bool) -> nn.Module:
    return object.__new__(_dressed_class(cls, whole))


def dress(module: nn.Module) -> None:
    """Give an adapted module peft's names."""
    layer = layer_of(module)
    sides = [side for _, side in layer.sides()]
    adapted = any(map(first_parts, sides))
    if not adapted and not any(isinstance(side, TrainedCopy | TrainedRows | TiedRows) for side in sides):
        return
    module.__class__ = _dressed_class(_plain_class(module), not adapted)
    for name, side in layer.sides():
        if isinstance(side, LowRank):
            layer.scales.setdefault(name, side.scale)


def undress(module: nn.Module) -> None:
    """Give a module its own class back."""
    vars(module).pop(_STATE, None)
    if isinstance(module, AdaptedLayer):
        module.__class__ = _plain_class(module)  # pyright: ignore[reportAttributeAccessIssue]


def _patterns(side: SidePath) -> dict[str, str]:
    """Return own tensor name → name in peft's modules, with ``{}`` in the place of the adapter's name."""
    if isinstance(side, Copy):
        # in files a copy has the module's own names, or another word before them (a norm's)
        word = "modules_to_save" if isinstance(side, TrainedCopy) else next(iter(side.export())).partition(".")[0]
        return {f"copy.{own}": f"{word}.{{}}.{own}" for own in side.copy.state_dict()}
    if isinstance(side, TrainedRows):
        return {"rows": "token_adapter.trainable_tokens_delta.{}"}
    parts = {own: _LIVE.get(theirs, theirs).partition(".") for own, theirs in side.peft_names.items()}
    return {} if isinstance(side, TrainedBias) else {own: f"{head}.{{}}{dot}{rest}" for own, (head, dot, rest) in parts.items()}


def first_parts(side: SidePath) -> dict[str, list[tuple[str, str]]]:
    """Return attribute of peft's layer → [(name of the tensor below it, own name)] for the tensors that `side` has."""
    found: dict[str, list[tuple[str, str]]] = {}
    existing = {name for name, _ in (*side.named_parameters(), *side.named_buffers())}
    for own, pattern in () if isinstance(side, TrainedCopy | TrainedRows) else _patterns(side).items():
        if own in existing:
            head, _, rest = pattern.partition(".{}")
            found.setdefault(head, []).append((rest.lstrip("."), own))
    return found


def peft_names(model: nn.Module, keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Return own key → peft's key for each of `keys`; `prefix` precedes all but those of side paths of the whole model.

    A trained bias has the key of the base's own bias, which is left out.
    """
    sides: dict[str, tuple[str, str, SidePath]] = {}
    inserted: dict[str, str] = {}
    hidden: set[str] = set()
    for path, _, slot in slots(model):
        dotted = f"{path}." if path else ""
        own = [side for _, side in slot.sides()]
        sides |= {f"{dotted}{SLOT}.{key}.": (path, name, side) for key, name, side in slot.entries()}
        hidden |= {f"{dotted}bias" for side in own if isinstance(side, TrainedBias)}
        if path and any(map(first_parts, own)):
            inserted[path] = "base_layer"
        elif path and any(isinstance(side, TrainedCopy | TrainedRows) for side in own):
            inserted[path] = "original_module"
    is_prompt = prefix == "base_model."
    matches = {key: _OF_SIDE_PATH.fullmatch(key) for key in keys}
    owners = [sides[match[1]] for match in matches.values() if match is not None]
    several = len({path for path, _, side in owners if not isinstance(side, TrainedCopy)}) > 1
    found: dict[str, str] = {}
    for key, match in matches.items():
        if match is not None:
            (path, name, side), own_name = sides[match[1]], match[2]
            if not path or (is_prompt and not isinstance(side, TrainedCopy)):
                # the path only where several modules have virtual tokens
                parts = ("prompt_encoder", name, path if is_prompt and several else "", own_name)
                found[key] = ".".join(part for part in parts if part)
            elif isinstance(side, TrainedBias):
                found[key] = prefix + ".".join((path, inserted[path], "bias") if path in inserted else (path, "bias"))
            else:
                found[key] = f"{prefix}{path}." + _patterns(side).get(own_name, f"{SLOT}.{{}}.{own_name}").format(name)
        elif key not in hidden:
            parts = key.split(".")
            words = [inserted.get(".".join(parts[: n + 1])) if n + 1 < len(parts) else None for n in range(len(parts))]
            found[key] = prefix + ".".join(text for pair in zip(parts, words, strict=True) for text in pair if text)
    return found
