"""Attach small trained side paths to a frozen model, activate them, and detach them again.

A :class:`Site` is a module to adapt, a :class:`SidePath` the part trained there, a :class:`Method` chooses and builds.

Laws, each tested over every method: only what the method declares is trained; the base's tensors are never written;
attach leaves the output unchanged if the method says so; detach restores outputs, keys, types, hooks and flags exactly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from byway.core import switch
from byway.core.adapter import ROOT, Adapter, Root, adapters, roots
from byway.core.copies import TrainedCopy, tied_note
from byway.core.families.facts import inside
from byway.core.method import BuildContext, Method
from byway.core.slots import SLOT, SidePath, Site, Slot, muted, side_paths, slot_of, slots
from byway.core.targets.resolve import modules_to_save
from byway.core.weights import disable_repacking
from byway.errors import AdapterError, TargetError, listed, nearest

__all__ = ["activate", "attach", "detach", "disabled", "install", "owner_of", "planned"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    tokenizer: Any = None,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
) -> Adapter:
    """Freeze `model`, attach the side paths of `method` and make them active, in addition to those that already are.

    All or nothing: every error is raised before the model is touched.

    Args:
        model: any ``nn.Module``; it stays the same object.
        method: for instance ``byway.LoRA(rank=8)``.
        name: the adapter's name: a letter or digit, then up to 63 letters, digits, ``_`` or ``-``.
        tokenizer: for methods that are initialized from text.
        batches: calibration batches, for methods that are initialized from data.

    Raises:
        TargetError: something asked for is not in the model.
        AdapterError: the name is taken or not allowed, or the model is already sharded.
    """
    _check_new(model, name)
    context = BuildContext(tokenizer, batches)
    method = method.prepare(model, context)
    plan, notes = planned(model, method, context)
    return install(model, method, name, plan, notes=notes)


def planned(model: nn.Module, method: Method, context: BuildContext) -> tuple[list[tuple[Site, SidePath]], tuple[str, ...]]:
    """Build the side paths of `method` without touching `model`, and return them with notes for the user."""
    placement = method.plan(model)
    saved = modules_to_save(model, method.modules_to_save)
    copied: list[tuple[Site, SidePath]] = [(site, TrainedCopy(site.module)) for site in saved]

    def whole(site: Site) -> bool:
        """True if the site is trained whole, or is a part of what is, so that it is not adapted as well."""
        return any(inside(site.path, copy.path) for copy in saved)

    sites = [site for site in placement.sites if not whole(site)]
    if not sites and not copied:
        raise TargetError(f"{type(method).__name__} found no site in {type(model).__name__}", "name targets that exist")
    method.check(sites)
    plan = [(site, method.build(site, model, context)) for site in sites]
    plan += [*copied, *((site, side) for site, side in method.extras(model, context, sites) if not whole(site))]
    notes = [*(tied_note(model, site) for site in saved), *placement.notes]
    if method.peft is not None and (declined := method.peft.declines(method, model, plan)):
        notes.append(f"saved in Byway's own format: {declined}")
    return plan, tuple(filter(None, notes))


def _check_new(model: nn.Module, name: str) -> None:
    """Refuse an adapter name that is taken or malformed, and a model that is already sharded."""
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


def install(
    model: nn.Module,
    method: Method,
    name: str,
    plan: Sequence[tuple[Site, SidePath]],
    *,
    notes: tuple[str, ...] = (),
    trainable: bool = True,
) -> Adapter:
    """Attach side paths that are built, the second half of :func:`attach`. Every check precedes the first change."""
    _check_new(model, name)
    acting = {active for _, _, slot in slots(model) for active in slot.active}
    everyone = (*(other for other in adapters(model) if other in acting), name)
    for site, side in plan:
        slot = slot_of(site.module)
        rivals = slot.rivals(everyone) if slot is not None else []
        if rivals and side.overrides("instead"):
            raise AdapterError(
                f"adapter {rivals[0]!r} already replaces the output of {site.path!r}; {name!r} would too",
                "byway.activate(model, []) first, then activate the one you want",
            )
    root = vars(model).get(ROOT)
    if root is None:
        root = Root()
        ours = {id(p) for _, _, side in side_paths(model) for p in side.parameters()}
        base = [(n, p) for n, p in model.named_parameters() if id(p) not in ours]
        root.trained = tuple(n for n, p in base if p.requires_grad)
        for _, parameter in base:
            parameter.requires_grad_(False)
        vars(model)[ROOT] = root
        root.load_hook = model.register_load_state_dict_pre_hook(_fill_in)
        switch.patch(model)
    disable_repacking(model)
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


def _fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: a state dict without an adapter's keys leaves the adapter as it is; one with some is refused."""
    for adapter in adapters(module).values():
        own = {prefix + key: value for key, value in adapter.state_dict().items()}
        if own.keys().isdisjoint(state_dict):
            state_dict.update(own)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make exactly the named adapters active, in attach order; ``[]`` for none. ``requires_grad`` is not touched.

    Raises:
        AdapterError: an unknown name, or two adapters that would both replace the output of one module.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        owner_of(model, name)
    for path, _, slot in slots(model):
        rivals = slot.rivals(wanted)
        if len(rivals) > 1:
            raise AdapterError(f"adapters {rivals[0]!r} and {rivals[1]!r} both replace the output of {path!r}", "activate one of them")
    for _, _, slot in slots(model):
        slot.activate(wanted)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, Root]:
    """Return the root that adapter `name` is attached to, and its record. Raises AdapterError if there is none."""
    for module, root in roots(model):
        if name in root.adapters:
            return module, root
    there = adapters(model)
    raise AdapterError(f"no adapter named {name!r} is attached (there are: {listed(there) or 'none'})", nearest(name, there))


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which `model` computes what the bare base does, in this thread or task only."""
    return muted(model)


def detach(model: nn.Module, name: str = "default") -> None:
    """Remove adapter `name`. With the last one, hooks, keys, attention function and flags are restored too."""
    owner, root = owner_of(model, name)
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
        switch.unpatch(owner)
        del vars(owner)[ROOT]
        for parameter_name, parameter in owner.named_parameters():
            if parameter_name in root.trained:
                parameter.requires_grad_(True)
