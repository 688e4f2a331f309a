"""How a side path hangs on a module: a named slot below the module, and hooks that exist only for the verbs somebody uses.

A :class:`Slot` is the child ``<path>.byway`` of an adapted module; its children are side paths by adapter name. The base module keeps its
type, its class and its state-dict keys. Limits that follow from hooks: code that calls ``module.forward`` or reads ``module.weight`` itself
passes a side path by (the core finds such a *dead* site at the first forward); shard for tensor parallelism before attaching.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
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
    "Ref",
    "SidePath",
    "Site",
    "Slot",
    "base_modules",
    "base_state_dict",
    "first",
    "first_to_see",
    "muted",
    "parent_path",
    "penalties",
    "side_paths",
    "slot_of",
    "slots",
]

SLOT = "byway"

_MUTED: ContextVar[frozenset[int]] = ContextVar("byway_muted_slots", default=frozenset())


class SidePath(nn.Module):
    """What is trained at one site: its parameters and persistent buffers are the adapter's state there.

    A side path overrides only the verbs it needs; the others cost nothing. `inputs` holds the arguments of the site's ``forward`` by
    name, positional ones first, so that ``next(iter(inputs.values()))`` is the first argument whatever its name.
    """

    peft_names: dict[str, str] = {}  # noqa: RUF012 - a constant of the class
    """Own tensor name → the name below the module path in HF peft's files; empty where peft has no such side path."""
    detached: ClassVar[bool] = False
    """On a module that holds layers: it reads them without a graph and acts above them, so that no layer is differentiated for it."""

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rewrite what goes into the module."""
        return inputs

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        """Rewrite what comes out of the module."""
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """On a module that owns attention: rewrite keys and values (b, heads, t, head size), mask (True: seen) and position bias."""
        return key, value, mask, bias

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        """Answer in the module's place; at most one active side path of a site does."""
        raise TypeError(f"{type(self).__name__} does not answer in its module's place")

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's ``{"weight", "bias"}`` → the same names with this side path in them (float32 or float64, its own layout)."""
        raise NotMergeable("what it computes has no equal in the base's weights", "keep it as an adapter")

    @property
    def folds_rows(self) -> bool:
        """Whether it changes nothing but a map's weight, each row by itself: :meth:`fold_rows` may be asked for some of them."""
        return False

    def fold_bound(self) -> float:
        """No number of the update that :meth:`fold_rows` adds is larger (absolute), told without making it; infinite: not known."""
        return math.inf

    def fold_rows(self, weight: Tensor, rows: slice, spare: Tensor) -> None:
        """Put this side path into `weight`, these rows of the weight (float32 or float64), in place, as :meth:`fold` does.

        `spare`: room of the same shape and dtype, to be written to.
        """
        raise NotMergeable("what it computes is not folded row by row", "fold the whole tensors")

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss, or None."""
        return None

    def export(self) -> dict[str, Tensor]:
        """What other programs read: peft's names below the module path → tensors. ``state_dict()`` is what training resumes from."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        return {theirs: own[ours].detach() for ours, theirs in self.peft_names.items() if ours in own}

    def places(self) -> dict[str, Tensor]:
        """Where the tensors of a peft file go: its names → own tensors, to be written into. Default: those of :meth:`export`."""
        return self.export()

    def resize(self, found: Mapping[str, Tensor]) -> None:
        """Before a file in Byway's own format fills this side path: give tensors whose size the file decides that size; default nothing."""

    def learns(self) -> bool:
        """Whether a gradient is wanted here: for its own parameters; overridden by what reads those of another side path."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def taken(self) -> None:
        """Called when it no longer hangs on its module: put back what it changed beside what the core restores; default nothing."""

    def overrides(self, verb: str) -> bool:
        """Whether this class brings its own `verb`."""
        return getattr(type(self), verb) is not getattr(SidePath, verb)


class Ref:
    """A module that is pointed at and not owned: it is no child, so its tensors are in nobody else's state dict."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Slot(nn.Module):
    """The side paths at one module, by adapter name; any name goes (``nn.ModuleDict`` refuses ``train``, ``keys``, ``type``)."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.names = _argument_names(site)
        self.active: tuple[str, ...] = ()
        self.befores: tuple[SidePath, ...] = ()
        self.afters: tuple[SidePath, ...] = ()
        self.attends: tuple[SidePath, ...] = ()
        self.answering: tuple[SidePath, ...] = ()  # at most one; in a tuple, so that it does not become a child a second time
        self.compiled_mute = 0  # dynamo cannot read a ContextVar: compiled code is guarded on this number instead
        self.handles: dict[str, RemovableHandle] = {}

    def forward(self, *args: Any) -> Any:
        """Nothing: a container that calls its children one after another (an adapted nn.Sequential) passes through its slot."""
        return args[0]

    def entries(self) -> Iterator[tuple[str, str, SidePath]]:
        """(key, adapter name, side path), in attach order. The key is the child's name: the adapter's, or ``name+1`` … for further ones."""
        for key, side in self._modules.items():
            if isinstance(side, SidePath):
                yield key, key.partition("+")[0], side

    def sides(self) -> Iterator[tuple[str, SidePath]]:
        """(adapter name, side path), in attach order."""
        for _, name, side in self.entries():
            yield name, side

    def put(self, site: nn.Module, name: str, side: SidePath) -> None:
        """Hang `side` for adapter `name`, not yet active; an adapter may hang several at one site, which act in this order."""
        count = sum(own == name for own, _ in self.sides())
        self._modules[f"{name}+{count}" if count else name] = side
        self._hook(site, side)

    def _hook(self, site: nn.Module, side: SidePath) -> None:
        """Register what `side` needs and nobody has registered yet."""
        if side.overrides("before") and "before" not in self.handles:
            self.handles["before"] = site.register_forward_pre_hook(_before, with_kwargs=True)
        if side.overrides("after") and "after" not in self.handles:
            self.handles["after"] = site.register_forward_hook(_after, with_kwargs=True)
        if side.overrides("instead") and not isinstance(site.__dict__.get("forward"), _Answer):
            site.forward = _Answer(site, site.__dict__.get("forward"))

    def take(self, site: nn.Module, name: str) -> None:
        """Remove the side paths of adapter `name` and every hook that nobody needs any more."""
        for key, side in [(key, side) for key, own, side in self.entries() if own == name]:
            del self._modules[key]
            side.taken()
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
        """Hang everything on `new`, which replaces `old` in the model."""
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
        """Make exactly the side paths in `names` that hang here act, in attach order."""
        self.active = tuple(dict.fromkeys(name for name, _ in self.sides() if name in names))
        sides = [side for name, side in self.sides() if name in names]
        self.befores = tuple(side for side in sides if side.overrides("before"))
        self.afters = tuple(side for side in sides if side.overrides("after"))
        self.attends = tuple(side for side in sides if side.overrides("attend"))
        self.answering = tuple(side for side in sides if side.overrides("instead"))

    def rivals(self, names: tuple[str, ...]) -> list[str]:
        """The adapters among `names` that would all answer in this module's place; more than one cannot be active."""
        return [name for name, side in self.sides() if name in names and side.overrides("instead")]

    def silent(self) -> bool:
        """Whether :func:`muted` covers this slot here and now."""
        if torch.compiler.is_compiling():
            return self.compiled_mute > 0
        return id(self) in _MUTED.get()


class _Answer:
    """An instance ``forward`` that lets the active side path answer; an object, since a bound method would not survive pickling."""

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


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments → one dict by name; surplus positional ones (``*args``) under ``"*"``."""
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
    # the call keeps its form: what came by position goes on by position
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
    """The slot of this very module, or None."""
    slot = module._modules.get(SLOT)
    return slot if isinstance(slot, Slot) else None


def first_to_see(module: nn.Module, side: SidePath) -> bool:
    """True if `side` receives the module's output before any other side path and any other forward hook."""
    slot = slot_of(module)
    if slot is None or not slot.afters or slot.afters[0] is not side or _global_forward_hooks:
        return False
    return next(iter(module._forward_hooks), None) == slot.handles["after"].id


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(path, module, slot) for every module of `model` that has one, in module order."""
    for path, module in base_modules(model):
        slot = slot_of(module)
        if slot is not None:
            yield path, module, slot


def base_modules(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without slots and what hangs in them: the base as it was before anything was attached."""
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Slot):
            yield from base_modules(child, f"{prefix}.{name}" if prefix else name, seen)


def parent_path(path: str) -> str:
    """``"a.b.c"`` → ``"a.b"``; a top-level module's parent is the root, ``""``."""
    return path.rpartition(".")[0]


@contextmanager
def muted(model: nn.Module) -> Iterator[None]:
    """Within this context (this thread or task, this model) no side path acts.

    Compiled code is muted for the whole process, since dynamo cannot read a context variable: do not share a compiled model between threads
    of which one is muted.
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
    """(site, adapter name, side path) for everything that hangs on `model`, in module order."""
    for path, module, slot in slots(model):
        for name, side in slot.sides():
            yield Site(path, module), name, side


def penalties(model: nn.Module) -> Tensor | None:
    """The sum of what the active side paths add to the loss of a step, or None."""
    acting = [side for _, _, slot in slots(model) for name, side in slot.sides() if name in slot.active and side.overrides("penalty")]
    found = [penalty for side in acting if (penalty := side.penalty()) is not None]
    return torch.stack(found).sum() if found else None


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` without the adapters: what a bare base of the same class loads strictly."""
    prefixes = tuple(_full_name(path, "", "") for path, _, _ in slots(model))
    return {key: value for key, value in model.state_dict().items() if not (prefixes and key.startswith(prefixes))}


def _full_name(path: str, name: str, key: str) -> str:
    return ".".join(part for part in (path, SLOT, name) if part) + f".{key}"


@dataclass(frozen=True)
class Site:
    """Where a side path hangs."""

    path: str
    """Dotted module path from the root; ``""`` is the root itself."""
    module: nn.Module


def first(inputs: dict[str, Any]) -> Tensor:
    """The first argument of the site's forward, whatever it is called."""
    return next(iter(inputs.values()))
