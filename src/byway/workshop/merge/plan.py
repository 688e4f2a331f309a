"""Plan a file merge: which tensors of a model's files an adapter changes, and how to compute their new values.

Loading a base in its stored dtype memory-maps its files and copies nothing; a fold reads its one weight, in float32,
when it is written. The plan uses names in files: checkpoint names, a missing trunk prefix, tied weights that are stored
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from byway.core.adapter import adapters
from byway.core.copies import ends_of, holders, untied_note
from byway.core.disk.shards import Stored
from byway.core.families import checkpoint_names
from byway.core.families.facts import inside
from byway.core.folding import Scratch, changed_tensors, folded, own_tensors
from byway.core.merge import refusal
from byway.core.slots import SidePath, Site, base_modules, side_paths
from byway.core.token_rows import keeps_tie
from byway.core.weights import features, is_quantized
from byway.errors import AdapterError, NotMergeable

__all__ = ["Fold", "Names", "Plan", "Unplannable", "alike", "folds", "plan_files"]


class Unplannable(Exception):
    """The files cannot be rewritten tensor by tensor; the message says why. The caller then merges in memory."""


@dataclass(frozen=True)
class Fold:
    """A module that adapters change."""

    site: Site
    sides: tuple[SidePath, ...]
    """In the order in which they act."""
    changed: tuple[str, ...]
    """Names of the module's tensors that the fold changes: ``weight``, ``bias``, ``dense.weight`` ..."""

    def before(self) -> dict[str, Tensor]:
        """Return the module's own tensors, in float32 or float64."""
        return own_tensors(self.site.module)

    def after(self) -> dict[str, Tensor]:
        """Return the same with all side paths folded in, not rounded yet."""
        return folded(self.site.module, self.sides)


@torch.no_grad()
def folds(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """Return (changes by all attached adapters, path → why a site is unchanged). Computes each fold once to check it.

    Raises:
        NotMergeable: a side path cannot be folded into weights.
        AdapterError: a merged tensor would not be finite, or nothing would change at all.
    """
    sites: dict[str, tuple[Site, list[tuple[str, SidePath]]]] = {}
    for site, name, side in side_paths(model):
        sites.setdefault(site.path, (site, []))[1].append((name, side))
    found: list[Fold] = []
    skipped: dict[str, str] = {}
    scratch = Scratch()
    for path, (site, named) in sites.items():
        sides = tuple(side for _, side in named)
        try:
            changed = changed_tensors(path, site.module, sides, scratch, "nothing was written")
        except NotMergeable as error:
            name = next((name for name, side in named if _refuses(side, site.module)), named[-1][0])
            raise refusal(adapters(model)[name], path, error) from error
        if changed:
            found.append(Fold(site, sides, changed))
        else:
            skipped[path] = "its update is exactly zero"
    if not found:
        raise AdapterError(
            "the adapter changes no weight: every update is exactly zero, so the merged model would be a copy of the base",
            "was it trained? LoRA's B is zero until the first step",
        )
    return found, skipped


def _refuses(side: SidePath, module: nn.Module) -> bool:
    try:
        side.fold(own_tensors(module))
    except NotMergeable:
        return True
    return False


@dataclass
class Plan:
    """The tensors of the new files: changed, dequantized and copied ones."""

    folds: list[Fold]
    skipped: dict[str, str]
    changed: dict[str, tuple[Fold, str]] = field(default_factory=dict)
    """Name in the new files → (fold, name of its tensor)."""
    dequantized: dict[str, nn.Module] = field(default_factory=dict)
    """Name in the new files → quantized module that no adapter changes; its dequantized weight is written."""
    replaces: dict[str, str] = field(default_factory=dict)
    """Changed or dequantized tensor → tensor of the old files whose place and dtype it takes; absent for a new one."""
    copies: dict[str, str] = field(default_factory=dict)
    """Name in the new files → name in the old files, copied unchanged."""
    unties: bool = False
    """True if tied weights become separate."""
    notes: list[str] = field(default_factory=list)


def plan_files(model: nn.Module, stored: Mapping[str, Stored]) -> Plan:
    """Plan the merge of `model`, with adapters attached, whose base is in the files `stored`.

    Raises:
        Unplannable: the files cannot be rewritten tensor by tensor.
        NotMergeable, AdapterError: see :func:`folds`.
    """
    if not stored:
        raise Unplannable("the base has no safetensors files")
    found, skipped = folds(model)
    plan = Plan(found, skipped)
    names = Names(model, stored)
    for fold in found:
        for key in fold.changed:
            plan.changed[names.of(fold.site.path, key)] = (fold, key)
    _untie(model, plan, names)
    for path, module in base_modules(model):
        if is_quantized(module) and (name := names.of(path, "weight")) not in plan.changed:
            plan.dequantized[name] = module
    taken = plan.changed.keys() | plan.dequantized.keys()
    plan.replaces = {name: old for name in taken if (old := names.old(name)) is not None}
    for old in stored:
        new = names.renamed(old)
        if new is None:
            plan.notes.append(f"{old} is in the base's files but in no module of {type(model).__name__}; it was left out")
        elif new not in taken:
            plan.copies.setdefault(new, old)
    for name, (fold, key) in plan.changed.items():
        module, old = fold.site.module, plan.replaces.get(name)
        if old is not None:
            dequantized = key == "weight" and is_quantized(module)
            shape = features(module)[::-1] if dequantized else tuple(module.state_dict(keep_vars=True)[key].shape)
            if stored[old].shape != shape:  # the file uses another layout
                raise Unplannable(f"{old} is stored with shape {list(stored[old].shape)}, but its module has {list(shape)}")
    return plan


def _untie(model: nn.Module, plan: Plan, names: Names) -> None:
    """Give each end of a tie that a fold breaks its own tensor. A tie whose ends change equally is kept."""
    shared = holders(model)
    twins: list[str] = []  # other ends of kept ties: one end is stored
    for fold in plan.folds:
        for key in fold.changed:
            within, _, leaf = key.rpartition(".")
            path = ".".join(part for part in (fold.site.path, within) if part)
            ends = shared.get(id(model.get_submodule(path)._parameters.get(leaf)), [])
            if not ends:
                continue
            own = names.of(path, leaf)
            if alike(model, plan.folds, ends):
                # whatever name the file has for it
                for name in (names.of(*end) for end in ends):
                    if names.old(name) is not None:
                        plan.changed.setdefault(name, (fold, key))
                twins += [own] if names.old(own) is None else []
                continue
            holder = _holder(ends, names)
            for name in (names.of(*end) for end in ends):
                if name not in plan.changed:
                    plan.copies[name] = holder
            plan.unties = True
            plan.notes.append(untied_note(path, [end for end in ends_of(model, ends) if end != path]))
    if not plan.unties:
        for name in twins:
            plan.changed.pop(name, None)
        return
    # the merged model is loaded without ties: every end needs its tensor
    for ends in shared.values():
        for name in (names.of(*end) for end in ends):
            if name not in plan.changed and names.old(name) is None:
                plan.copies[name] = _holder(ends, names)


def alike(model: nn.Module, found: Sequence[Fold], ends: Sequence[tuple[str, str]]) -> bool:
    """True if the folds change a tensor alike at all its ends (module path, name), so that it stays one tensor."""
    around = ([fold for fold in found if inside(end, fold.site.path)] for end in ends_of(model, ends))
    return keeps_tie([[part for fold in folds for side in fold.sides for part in side.modules()] for folds in around])


def _holder(ends: Sequence[tuple[str, str]], names: Names) -> str:
    """Return the name in the old files of a tied tensor. Raises Unplannable if none of its ends is there."""
    holder = next((old for end in ends if (old := names.old(names.of(*end))) is not None), None)
    if holder is None:
        raise Unplannable(f"none of the tied tensors of {', '.join(end for end, _ in ends)} is in the base's files")
    return holder


class Names:
    """Names of a module's tensors in the old and the new files. New names are those that the model's class writes."""

    def __init__(self, model: nn.Module, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self.names = checkpoint_names(model)
        self.canonical = {
            f"{there}.{leaf}" if there else leaf
            for path, module in base_modules(model)
            if (there := self.names.get(path)) is not None
            for leaf in (*module._parameters, *module._buffers)
        }
        prefix = next((f"{c.__dict__['base_model_prefix']}." for c in type(model).__mro__ if c.__dict__.get("base_model_prefix")), "")
        whole = sum(name in stored for name in self.canonical)
        bare = sum(name.removeprefix(prefix) in stored for name in self.canonical if prefix and name.startswith(prefix))
        self.shift = prefix if bare > whole else ""
        """Prefix that names in the old files lack because they were saved from the bare trunk, or ``""``."""

    def of(self, path: str, key: str) -> str:
        """Return the name of a module's tensor. Raises Unplannable if there is no single one."""
        name = self.find(path, key)
        if name is None:
            raise Unplannable(f"{path}.{key} has no single name in the base's files")
        return name

    def find(self, path: str, key: str) -> str | None:
        """Return the name of a module's tensor, or None if there is no single one."""
        inside, _, leaf = key.rpartition(".")
        module = ".".join(part for part in (path, inside) if part)
        there = self.names.get(module)
        return None if there is None else f"{there}.{leaf}" if there else leaf

    def old(self, name: str) -> str | None:
        """Return the name in the base's files; None if they lack the tensor (a new head, the other end of a tie)."""
        candidates = (name, name.removeprefix(self.shift)) if self.shift else (name,)
        return next((c for c in candidates if c in self.stored), None)

    def renamed(self, old: str) -> str | None:
        """Return the new name of a stored tensor; None if it belongs to no module of this class."""
        if not self.shift or old in self.canonical:
            return old
        return self.shift + old if self.shift + old in self.canonical else None
