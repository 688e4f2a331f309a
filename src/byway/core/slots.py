"""Side paths and how they are attached to a module: a named slot below it, and hooks only for the verbs in use.

A :class:`Slot` is the child ``<path>.byway`` of an adapted module. Its children are the side paths, by adapter name.
The base module keeps its class and its state-dict keys.

Hooks have limits. Code that calls ``module.forward`` directly, or reads ``module.weight``, bypasses the side path;
such a *dead* site is found at the first forward. Shard for tensor parallelism before attaching.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from byway.errors import AdapterError, NotMergeable

__all__ = [
    "SLOT",
    "ModuleRef",
    "RowFold",
    "SidePath",
    "Site",
    "Slot",
    "base_modules",
    "base_state_dict",
    "first",
    "first_to_see",
    "full_name",
    "muted",
    "parent_path",
    "penalties",
    "side_paths",
    "slot_of",
    "slots",
]

SLOT = "byway"

_MUTED: ContextVar[frozenset[int]] = ContextVar("byway_muted_slots", default=frozenset())


@dataclass(frozen=True)
class RowFold:
    """Fold some rows of a weight at a time; for a side path that changes only a map's weight, each row by itself."""

    add: Callable[[Tensor, slice, Tensor], None]
    """``add(weight, rows, spare)`` adds the update of `rows` to `weight` (just these rows, in float32 or float64).

    The result is that of ``SidePath.fold``. `spare` is scratch memory of the same shape and dtype."""
    bound: Callable[[], float]
    """Return an upper bound on the absolute value of any entry of the update, without computing the update."""


class SidePath(nn.Module):
    """The trained part at one site. Its parameters and persistent buffers are the adapter's state there.

    Seven verbs: :meth:`before`, :meth:`after`, :meth:`attend`, :meth:`instead`, :meth:`fold`, :meth:`penalty`,
    :meth:`export`. Override only those the method needs; the others cost nothing. `inputs` holds the arguments of the
    site's ``forward`` by name, positional ones first; :func:`first` returns the first one whatever its name.
    """

    peft_names: dict[str, str] = {}  # noqa: RUF012 - a constant of the class
    """Own tensor name → name below the module path in HF peft's files; empty if peft has no such side path."""
    detached: ClassVar[bool] = False
    """True if it is attached to a module that holds layers, and needs no gradient in any of them."""

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the module's inputs."""
        return inputs

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        """Rewrite the module's output."""
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """On an attention module: rewrite keys and values (b, heads, t, head size), mask (True: visible) and bias."""
        return key, value, mask, bias

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        """Compute the output in place of the module; at most one active side path of a site may."""
        raise TypeError(f"{type(self).__name__} does not replace its module's output")

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the module's tensors ``{"weight", "bias"}`` with this side path merged in.

        They keep their layout and are float32 or float64.

        Raises:
            NotMergeable: no weights of the base compute the same.
        """
        raise NotMergeable("what it computes has no equal in the base's weights", "keep it as an adapter")

    def penalty(self) -> Tensor | None:
        """Return a term to add to the loss, or None."""
        return None

    def export(self) -> dict[str, Tensor]:
        """Return what other programs read, by peft's names. Training resumes from ``state_dict()`` instead."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        return {theirs: own[ours].detach() for ours, theirs in self.peft_names.items() if ours in own}

    # rarely overridden: for merging, files, training and detaching

    def row_fold(self) -> RowFold | None:
        """Return how to :meth:`fold` by rows; None if that needs the whole weight or changes more than the weight."""
        return None

    def destinations(self) -> dict[str, Tensor]:
        """Return the own tensors that a peft file fills, by the file's names. Default: those of :meth:`export`."""
        return self.export()

    def resize(self, found: Mapping[str, Tensor]) -> None:
        """Resize tensors to their sizes in a file in Byway's own format, if the file decides them. Default: nothing."""

    def needs_gradient(self) -> bool:
        """True if a gradient must reach this site; override it if it reads trained parameters of another side path."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def removed(self) -> None:
        """Undo what this side path changed outside its slot, after it was taken off its module. Default: nothing."""

    def overrides(self, verb: str) -> bool:
        """True if this class implements `verb` itself."""
        return getattr(type(self), verb) is not getattr(SidePath, verb)


class ModuleRef:
    """A reference to a module that is not a child: its tensors do not appear in the owner's state dict."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Slot(nn.Module):
    """The side paths at one module, by adapter name; even one that ``nn.ModuleDict`` refuses (``train``)."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        parameters = list(inspect.signature(type(site).forward).parameters.values())[1:]
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        self.active: tuple[str, ...] = ()
        self.befores: tuple[SidePath, ...] = ()
        self.afters: tuple[SidePath, ...] = ()
        self.attends: tuple[SidePath, ...] = ()
        self.answering: tuple[SidePath, ...] = ()  # at most one; in a tuple, so that it is not registered as a child again
        self.compiled_mute = 0  # dynamo cannot read a ContextVar, so compiled code is guarded on this number
        self.handles: dict[str, RemovableHandle] = {}

    def forward(self, *args: Any) -> Any:
        """Return the input: an adapted nn.Sequential, which calls its children in turn, calls its slot too."""
        return args[0]

    def entries(self) -> Iterator[tuple[str, str, SidePath]]:
        """Yield (name of the child, adapter name, side path), in attach order; a second child is ``name+1``."""
        for key, side in self._modules.items():
            if isinstance(side, SidePath):
                yield key, key.partition("+")[0], side

    def sides(self) -> Iterator[tuple[str, SidePath]]:
        """Yield (adapter name, side path), in attach order."""
        for _, name, side in self.entries():
            yield name, side

    def put(self, site: nn.Module, name: str, side: SidePath) -> None:
        """Add `side` for adapter `name`, not yet active. Several of one adapter at one site act in this order."""
        count = sum(own == name for own, _ in self.sides())
        self._modules[f"{name}+{count}" if count else name] = side
        self._hook(site, side)

    def _hook(self, site: nn.Module, side: SidePath) -> None:
        """Register the hooks that `side` needs and that are not there yet."""
        if side.overrides("before") and "before" not in self.handles:
            self.handles["before"] = site.register_forward_pre_hook(_before, with_kwargs=True)
        if side.overrides("after") and "after" not in self.handles:
            self.handles["after"] = site.register_forward_hook(_after, with_kwargs=True)
        if side.overrides("instead") and not isinstance(site.__dict__.get("forward"), _Answer):
            site.forward = _Answer(site, site.__dict__.get("forward"))

    def take(self, site: nn.Module, name: str) -> None:
        """Remove the side paths of adapter `name` and every hook that is no longer needed."""
        for key, side in [(key, side) for key, own, side in self.entries() if own == name]:
            del self._modules[key]
            side.removed()
        self.activate(tuple(n for n in self.active if n != name))
        for verb in ("before", "after"):
            if verb in self.handles and not any(side.overrides(verb) for _, side in self.sides()):
                self.handles.pop(verb).remove()
        answer = site.__dict__.get("forward")
        if isinstance(answer, _Answer) and not any(side.overrides("instead") for _, side in self.sides()):
            if answer.previous is None:
                del site.__dict__["forward"]
            else:
                site.forward = answer.previous

    def move(self, old: nn.Module, new: nn.Module) -> None:
        """Move everything to `new`, which replaces `old` in the model."""
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()
        answer = old.__dict__.pop("forward", None)
        if answer is not None and not isinstance(answer, _Answer):
            old.forward = answer
        del old._modules[SLOT]
        new.add_module(SLOT, self)
        for _, side in self.sides():
            self._hook(new, side)

    def activate(self, names: tuple[str, ...]) -> None:
        """Make exactly the side paths of the adapters in `names` active, in attach order."""
        self.active = tuple(dict.fromkeys(name for name, _ in self.sides() if name in names))
        sides = [side for name, side in self.sides() if name in names]
        self.befores = tuple(side for side in sides if side.overrides("before"))
        self.afters = tuple(side for side in sides if side.overrides("after"))
        self.attends = tuple(side for side in sides if side.overrides("attend"))
        self.answering = tuple(side for side in sides if side.overrides("instead"))

    def rivals(self, names: tuple[str, ...]) -> list[str]:
        """Return the adapters in `names` that replace this module's output; at most one of them can be active."""
        return [name for name, side in self.sides() if name in names and side.overrides("instead")]

    def silent(self) -> bool:
        """True if :func:`muted` covers this slot in the current context."""
        if torch.compiler.is_compiling():
            return self.compiled_mute > 0
        return id(self) in _MUTED.get()


class _Answer:
    """An instance ``forward`` that calls ``instead``; an object, since a bound method cannot be pickled."""

    def __init__(self, module: nn.Module, previous: Any) -> None:
        self.module = module
        self.previous = previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = slot_of(self.module)
        if slot is not None and slot.answering and not slot.silent():
            return slot.answering[0].instead(self.module, _bind(slot.names, args, kwargs))
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind positional and keyword arguments to names; surplus positional ones (``*args``) go under ``"*"``."""
    inputs = dict(zip(names, args, strict=False))
    if len(args) > len(names):
        inputs["*"] = args[len(names) :]
    inputs.update(kwargs)
    return inputs


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    slot = slot_of(module)
    if slot is None or not slot.befores or slot.silent():
        return None
    inputs = _bind(slot.names, args, kwargs)
    for side in slot.befores:
        inputs = side.before(inputs)
    # keep the form of the call: arguments passed by position stay positional
    positional = [name for name in slot.names[: len(args)] if name in inputs]
    surplus = inputs.pop("*", ())
    return (*(inputs.pop(name) for name in positional), *surplus), inputs


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    slot = slot_of(module)
    if slot is None or not slot.afters or slot.silent():
        return out
    inputs = _bind(slot.names, args, kwargs)
    for side in slot.afters:
        out = side.after(inputs, out)
    return out


def slot_of(module: nn.Module) -> Slot | None:
    """Return the slot of this very module, or None."""
    slot = module._modules.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def first_to_see(module: nn.Module, side: SidePath) -> bool:
    """True if `side` receives the module's output before any other side path and any other forward hook."""
    slot = slot_of(module)
    if slot is None or not slot.afters or slot.afters[0] is not side or _global_forward_hooks:
        return False
    return next(iter(module._forward_hooks), None) == slot.handles["after"].id


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """Yield (path, module, slot) for every module of `model` that has one, in module order."""
    for path, module in base_modules(model):
        slot = slot_of(module)
        if slot is not None:
            yield path, module, slot


def base_modules(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over ``model.named_modules()`` of the bare base, without slots and side paths."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Slot):
            yield from base_modules(child, f"{prefix}.{name}" if prefix else name, seen)


def parent_path(path: str) -> str:
    """Return the parent of a module path: ``"a.b.c"`` → ``"a.b"``; that of a top-level module is the root, ``""``."""
    return path.rpartition(".")[0]


@contextmanager
def muted(model: nn.Module) -> Iterator[None]:
    """Context in which no side path of `model` acts, in this thread or task only.

    Compiled code is muted in the whole process, since dynamo cannot read a context variable: do not share a compiled
    model between threads if one of them is muted.
    """
    found = [slot for _, _, slot in slots(model)]
    if not found:
        raise AdapterError("nothing is attached to this model, so there is nothing to disable", "byway.attach(model, method) first")
    token = _MUTED.set(_MUTED.get() | {id(slot) for slot in found})
    for slot in found:
        slot.compiled_mute += 1
    try:
        yield
    finally:
        for slot in found:
            slot.compiled_mute -= 1
        _MUTED.reset(token)


def side_paths(model: nn.Module) -> Iterator[tuple[Site, str, SidePath]]:
    """Yield (site, adapter name, side path) for everything attached to `model`, in module order."""
    for path, module, slot in slots(model):
        for name, side in slot.sides():
            yield Site(path, module), name, side


def penalties(model: nn.Module) -> Tensor | None:
    """Return the sum of the penalties that active side paths add to the loss, or None."""
    acting = [side for _, _, slot in slots(model) for name, side in slot.sides() if name in slot.active and side.overrides("penalty")]
    found = [penalty for side in acting if (penalty := side.penalty()) is not None]
    return torch.stack(found).sum() if found else None


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return ``model.state_dict()`` without the adapters; a bare base of the same class loads it strictly."""
    prefixes = tuple(full_name(path, "", "") for path, _, _ in slots(model))
    return {key: value for key, value in model.state_dict().items() if not (prefixes and key.startswith(prefixes))}


def full_name(path: str, name: str, key: str) -> str:
    """Return the name in the model of tensor `key` of the side path `name` at `path`."""
    return ".".join(part for part in (path, SLOT, name) if part) + f".{key}"


@dataclass(frozen=True)
class Site:
    """A module that a side path is attached to."""

    path: str
    """Dotted module path from the root; ``""`` is the root itself."""
    module: nn.Module


def first(inputs: dict[str, Any]) -> Tensor:
    """Return the first argument of the site's forward, whatever its name."""
    return next(iter(inputs.values()))
