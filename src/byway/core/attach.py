"""The core: a small side path is hung beside a frozen model.

Three nouns: a :class:`Site` is where, a :class:`SidePath` is what is trained there, a :class:`Method` is how.
Four verbs: :func:`attach` and :func:`detach`, :func:`side_paths` to look, and ``byway.merge``.

Laws, each tested over every method: only what the method declares is trained; the base's tensors are never written; the output at attach
equals that of the *frozen* base where the method says so; detach restores outputs, keys, types, hooks and flags bit for bit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from byway.core import switch
from byway.core.adapter import _ROOT, Adapter, _Root, _roots, adapters
from byway.core.method import BuildContext, Frozen, Method
from byway.core.slots import SLOT, Ref, SidePath, Site, Slot, base_modules, muted, side_paths, slot_of, slots
from byway.core.weights import settle
from byway.errors import AdapterError, TargetError, listed, nearest

__all__ = [
    "BuildContext",
    "Frozen",
    "Method",
    "Ref",
    "SidePath",
    "Site",
    "activate",
    "attach",
    "base_modules",
    "detach",
    "disabled",
    "hang",
    "planned",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    tokenizer: Any = None,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
) -> Adapter:
    """Freeze `model`, build `method`'s side paths beside it and make them active beside those that already are.

    All or nothing: whatever cannot be done is found before the model is touched.

    Args:
        model: any ``nn.Module``; it stays the object it is.
        method: for instance ``byway.LoRA(rank=8)``.
        name: the adapter's name: a letter or digit, then up to 63 letters, digits, ``_`` or ``-``.
        tokenizer: for methods that start from text.
        batches: calibration batches, for methods that start from data.

    Raises:
        TargetError: something asked for is not in the model.
        AdapterError: the name is taken or not allowed, or the model is already sharded.
    """
    _check_new(model, name)
    context = BuildContext(tokenizer, batches)
    method = method.prepare(model, context)
    plan, notes = planned(model, method, context)
    return hang(model, method, name, plan, notes=notes)


def planned(model: nn.Module, method: Method, context: BuildContext) -> tuple[list[tuple[Site, SidePath]], tuple[str, ...]]:
    """The first half of :func:`attach`: every side path, built and not yet hung, and what the user should know. `model` is not touched."""
    sites = list(method.sites(model))
    copied, notes = _copies(model, method)
    inside = tuple(site.path for site, _ in copied)
    sites = [site for site in sites if not _lies_in(site.path, inside)]
    if not sites and not copied:
        raise TargetError(f"{type(method).__name__} found no site in {type(model).__name__}", "name targets that exist")
    method.check(sites)
    plan = [(site, method.build(site, model, context)) for site in sites]
    plan += [*copied, *((site, side) for site, side in method.extras(model, context, sites) if not _lies_in(site.path, inside))]
    return plan, (*notes, *method.notes(model))


def _lies_in(path: str, modules: tuple[str, ...]) -> bool:
    """Whether `path` is one of `modules` or below one: what is trained whole is not adapted a second time."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _check_new(model: nn.Module, name: str) -> None:
    """Refuse an adapter name that is taken or malformed, and a model that cannot take side paths any more."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r} is not allowed",
            "use a letter or digit, then up to 63 letters, digits, '_' or '-' (it becomes a directory)",
        )
    if name in adapters(model):
        raise AdapterError(f"an adapter named {name!r} is already attached", "choose another name, or byway.detach it first")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        raise AdapterError(
            "the model is already sharded (fully_shard): the gradients of a side path attached now would not be reduced",
            "attach first, shard afterwards",
        )


def _copies(model: nn.Module, method: Method) -> tuple[list[tuple[Site, SidePath]], tuple[str, ...]]:
    from byway.core.copies import TrainedCopy, tied_note
    from byway.core.targets.resolve import modules_to_save

    sites = modules_to_save(model, method.modules_to_save)
    return [(site, TrainedCopy(site.module)) for site in sites], tuple(n for site in sites if (n := tied_note(model, site)))


def hang(
    model: nn.Module,
    method: Method,
    name: str,
    plan: Sequence[tuple[Site, SidePath]],
    *,
    notes: tuple[str, ...] = (),
    trainable: bool = True,
) -> Adapter:
    """The second half of :func:`attach`: hang side paths that are already built. Nothing here can fail halfway."""
    _check_new(model, name)
    everyone = (*_active(model), name)
    for site, side in plan:
        slot = slot_of(site.module)
        rivals = slot.rivals(everyone) if slot is not None else []
        if rivals and side.overrides("instead"):
            raise AdapterError(
                f"adapter {rivals[0]!r} already answers in place of {site.path!r}; {name!r} would too",
                "byway.activate(model, []) first, then activate the one you want",
            )
    root = _ensure_root(model)
    settle(model)
    for site, side in plan:
        side.train(site.module.training).requires_grad_(trainable)
        own = slot_of(site.module)
        if own is None:
            own = Slot(site.module)
            site.module.add_module(SLOT, own)
        own.put(site.module, name, side)
    adapter = Adapter(model, name, method, notes)
    root.adapters[name] = adapter
    if root.attention is None and any(side.overrides("attend") for _, side in plan):
        from byway.core import attention

        root.attention = attention.install(model)
    root.watch.add(model, name, [site.path for site, _ in plan])
    activate(model, everyone)
    return adapter


def _active(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that act somewhere, in attach order."""
    acting = {name for _, _, slot in slots(model) for name in slot.active}
    return tuple(name for name in adapters(model) if name in acting)


def _ensure_root(model: nn.Module) -> _Root:
    known = vars(model).get(_ROOT)
    if known is not None:
        return known
    root = _Root()
    hung = {id(p) for _, _, side in side_paths(model) for p in side.parameters()}
    base = [(n, p) for n, p in model.named_parameters() if id(p) not in hung]
    root.trained = tuple(n for n, p in base if p.requires_grad)
    for _, parameter in base:
        parameter.requires_grad_(False)
    vars(model)[_ROOT] = root
    root.load_hook = model.register_load_state_dict_pre_hook(_fill_in)
    switch.mend(model)
    return root


def _fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: a state dict that knows nothing of an adapter (a bare base) leaves it as it is; a partial one is refused."""
    for adapter in adapters(module).values():
        own = {prefix + key: value for key, value in adapter.state_dict().items()}
        if own.keys().isdisjoint(state_dict):
            state_dict.update(own)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Leave exactly the named adapters active (in attach order); ``[]`` leaves none. ``requires_grad`` is not touched.

    Raises:
        AdapterError: an unknown name, or two adapters that would both answer in place of one module.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        _known(model, name)
    for path, _, slot in slots(model):
        rivals = slot.rivals(wanted)
        if len(rivals) > 1:
            raise AdapterError(f"adapters {rivals[0]!r} and {rivals[1]!r} both answer in place of {path!r}", "activate one of them")
    for _, _, slot in slots(model):
        slot.activate(wanted)


def _known(model: nn.Module, name: str) -> tuple[nn.Module, _Root]:
    for module, root in _roots(model):
        if name in root.adapters:
            return module, root
    there = adapters(model)
    raise AdapterError(f"no adapter named {name!r} is attached (there are: {listed(there) or 'none'})", nearest(name, there))


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """``with byway.disabled(model):`` the bare base answers, in this thread or task only."""
    return muted(model)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take adapter `name` away. With the last one goes every trace: hooks, keys, attention function, and flags are as they were."""
    owner, root = _known(model, name)
    root.watch.remove(name)
    for _, module, own in list(slots(owner)):
        own.take(module, name)
        if not any(own.sides()):
            del module._modules[SLOT]
    del root.adapters[name]
    if root.attention is not None and not any(side.overrides("attend") for _, _, side in side_paths(owner)):
        from byway.core import attention

        attention.restore(owner, root.attention)
        root.attention = None
    if not root.adapters:
        if root.load_hook is not None:
            root.load_hook.remove()
        switch.unmend(owner)
        del vars(owner)[_ROOT]
        for parameter_name, parameter in owner.named_parameters():
            if parameter_name in root.trained:
                parameter.requires_grad_(True)
