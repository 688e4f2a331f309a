"""Which tensors of a model's files an adapter changes, and into what: worked out on a model whose weights stay memory-mapped.

Loading a base in the dtype it is stored in maps its files and copies nothing; a fold then reads one weight, in float32, when its turn
comes. The plan knows names in files (checkpoint names, a missing or surplus trunk prefix, tied weights that are stored once).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from byway.core.adapter import adapters
from byway.core.copies import keeps_tie
from byway.core.families import checkpoint_names
from byway.core.folding import Scratch, folded, own_tensors, pieces, surely_finite
from byway.core.merge import refusal
from byway.core.slots import SidePath, Site, base_modules, side_paths
from byway.core.weights import dense, is_quantized
from byway.disk.shards import Stored
from byway.errors import AdapterError, NotMergeable

__all__ = ["Fold", "Names", "Plan", "Unplannable", "folds", "plan_files", "ties"]


class Unplannable(Exception):
    """The files cannot be rewritten tensor by tensor; the message says why. Internal: the caller merges in memory instead."""


@dataclass(frozen=True)
class Fold:
    """One module that adapters change."""

    site: Site
    sides: tuple[SidePath, ...]
    """In the order in which they act."""
    changed: tuple[str, ...]
    """Which of the module's own tensors differ afterwards: ``weight``, ``bias``, ``dense.weight`` ..."""

    def before(self) -> dict[str, Tensor]:
        """The module's own tensors, in float32 at least."""
        return own_tensors(self.site.module)

    def after(self) -> dict[str, Tensor]:
        """The same with everything folded in, not rounded yet."""
        return folded(self.site.module, self.sides)


@torch.no_grad()
def folds(model: nn.Module) -> tuple[list[Fold], dict[str, str]]:
    """(what every attached adapter changes, path → why a site is left alone); everything is computed once to be checked.

    Raises:
        NotMergeable: a side path has no equal in weights.
        AdapterError: a merged tensor would not be finite, or nothing would change at all.
    """
    sites: dict[str, tuple[Site, list[SidePath]]] = {}
    for site, _, side in side_paths(model):
        sites.setdefault(site.path, (site, []))[1].append(side)
    found: list[Fold] = []
    skipped: dict[str, str] = {}
    scratch = Scratch()
    for path, (site, sides) in sites.items():
        changed = _changed(model, site, sides, scratch)
        if changed:
            found.append(Fold(site, tuple(sides), changed))
        else:
            skipped[path] = "its update is exactly zero"
    if not found:
        raise AdapterError(
            "the adapter changes no weight at all: every update is exactly zero, and a merge would be a copy of the base",
            "was it trained? a LoRA's B is zero until the first step",
        )
    return found, skipped


def _changed(model: nn.Module, site: Site, sides: Sequence[SidePath], scratch: Scratch) -> tuple[str, ...]:
    """Which of the module's tensors are others afterwards; refuses as :func:`folds` does."""
    changed: dict[str, None] = {}
    try:
        finite = surely_finite(site.module, sides)
        for piece in pieces(site.module, sides, scratch):
            if not (finite or piece.finite):
                what = f"merging {site.path} would give a {piece.key} that is not finite; nothing was written"
                raise AdapterError(what, "check the adapter")
            if piece.key not in changed and piece.differs:
                changed[piece.key] = None
            if finite and changed:
                break  # the weight is all there is
    except NotMergeable as error:
        there = {id(side): name for _, name, side in side_paths(model)}
        name = next((there[id(side)] for side in sides if _refuses(side, site.module)), there[id(sides[-1])])
        raise refusal(adapters(model)[name], site.path, error) from error
    return tuple(changed)


def _refuses(side: SidePath, module: nn.Module) -> bool:
    try:
        side.fold(own_tensors(module))
    except NotMergeable:
        return True
    return False


@dataclass
class Plan:
    """The new files, tensor by tensor, beside what is copied unchanged."""

    folds: list[Fold]
    skipped: dict[str, str]
    changed: dict[str, tuple[Fold, str]] = field(default_factory=dict)
    """Name in the new files → (fold, which of its tensors)."""
    dequantized: dict[str, nn.Module] = field(default_factory=dict)
    """Name → the quantized module whose 16-bit equal is written, though no adapter changes it."""
    replaces: dict[str, str] = field(default_factory=dict)
    """Name of a changed or dequantized tensor → the one of the old files whose place and dtype it takes; absent for a new tensor."""
    copies: dict[str, str] = field(default_factory=dict)
    """Name in the new files → name in the old ones, copied unchanged."""
    unties: bool = False
    """Whether weights that were one are two now."""
    notes: list[str] = field(default_factory=list)


def plan_files(model: nn.Module, stored: Mapping[str, Stored]) -> Plan:
    """The plan for `model` with adapters attached, whose base lies in the files `stored`. Raises Unplannable, and as :func:`folds`."""
    found, skipped = folds(model)
    plan = Plan(found, skipped)
    names = Names(model, stored)
    for fold in found:
        for key in fold.changed:
            plan.changed[names.of(fold.site.path, key)] = (fold, key)
    _untie(model, plan, names)
    for path, module in base_modules(model):
        name = names.quiet(path, "weight") if is_quantized(module) else None
        if is_quantized(module) and name is None:
            raise Unplannable(f"the quantized {path} has no single name in the base's files")
        if name is not None and name not in plan.changed:
            plan.dequantized[name] = module
    taken = plan.changed.keys() | plan.dequantized.keys()
    plan.replaces = {name: old for name in taken if (old := names.old(name)) is not None}
    for old in stored:
        new = names.renamed(old)
        if new is None:
            plan.notes.append(f"{old} of the base's files belongs to no module of {type(model).__name__}: left out")
        elif new not in taken:
            plan.copies.setdefault(new, old)
    _check_shapes(plan, stored, names)
    return plan


def ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module path → the other modules whose ``weight`` is the very same tensor; for those that have such."""
    groups: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), []).append(path)
    return {path: tuple(other for other in group if other != path) for group in groups.values() if len(group) > 1 for path in group}


def _untie(model: nn.Module, plan: Plan, names: Names) -> None:
    """Give each end of a tie that a fold breaks a tensor of its own; a tie that trained rows keep stays one."""
    tied = ties(model)
    for fold in list(plan.folds):
        path = fold.site.path
        others = tied.get(path, ())
        if not others or "weight" not in fold.changed:
            continue
        ends = [
            [part for f in plan.folds if f".{end}.".startswith(f".{f.site.path}.") for side in f.sides for part in side.modules()]
            for end in (path, *others)
        ]
        own = names.of(path, "weight")
        if keeps_tie(ends):
            if names.old(own) is None:
                del plan.changed[own]  # the other end holds the same rows and is the one that is stored
            continue
        holder = next((q for q in (path, *others) if names.old(names.of(q, "weight")) is not None), None)
        if holder is None:
            raise Unplannable(f"no end of the tie of {path} is stored")
        for other in others:
            name = names.of(other, "weight")
            if name not in plan.changed:
                plan.copies[name] = names.old(names.of(holder, "weight")) or ""
        plan.unties = True
        plan.notes.append(f"{path} was tied to {', '.join(others)}: it has a weight of its own now")


def _check_shapes(plan: Plan, stored: Mapping[str, Stored], names: Names) -> None:
    """A tensor that replaces a stored one must have its shape; otherwise the file holds it in another layout."""
    for name, (fold, key) in plan.changed.items():
        old = names.old(name)
        if old is not None:
            own = stored[old].shape
            wanted = tuple(fold.after()[key].shape) if fold.site.module._parameters.get(key) is None else _shape(fold.site.module, key)
            if own != wanted:
                raise Unplannable(f"{old} is stored as {list(own)}, its module keeps {list(wanted)}")


def _shape(module: nn.Module, key: str) -> tuple[int, ...]:
    if key == "weight" and is_quantized(module):
        return tuple(dense(module).shape)
    return tuple(module.get_parameter(key).shape)


class Names:
    """Module path and tensor → name in the files, old and new. New names are the ones the model's class writes."""

    def __init__(self, model: nn.Module, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self.names = checkpoint_names(model)
        self.canonical = {
            f"{there}.{leaf}" if there else leaf
            for path, module in base_modules(model)
            if (there := self.names.get(path)) is not None
            for leaf in (*module._parameters, *module._buffers)
        }
        prefix = next((str(c.__dict__["base_model_prefix"]) for c in type(model).__mro__ if c.__dict__.get("base_model_prefix")), "")
        self.shift = self._shift(f"{prefix}.") if prefix else ""

    def _shift(self, prefix: str) -> str:
        """``prefix`` if the files were saved from the bare trunk, so that every name lacks it; else ``""``."""
        plain = sum(name in self.stored for name in self.canonical)
        without = sum(name.removeprefix(prefix) in self.stored for name in self.canonical if name.startswith(prefix))
        return prefix if without > plain else ""

    def of(self, path: str, key: str) -> str:
        """The name of a module's tensor; raises Unplannable where there is no single one."""
        name = self.quiet(path, key)
        if name is None:
            raise Unplannable(f"{path}.{key} has no single name in the base's files")
        return name

    def quiet(self, path: str, key: str) -> str | None:
        """The same, or None."""
        inside, _, leaf = key.rpartition(".")
        module = ".".join(part for part in (path, inside) if part)
        there = self.names.get(module)
        return None if there is None else f"{there}.{leaf}" if there else leaf

    def old(self, name: str) -> str | None:
        """Under which name the base's files hold it; None: they do not (a fresh head, the other end of a tie)."""
        candidates = (name, name.removeprefix(self.shift)) if self.shift else (name,)
        return next((c for c in candidates if c in self.stored), None)

    def renamed(self, old: str) -> str | None:
        """The new name of a stored tensor; None: it belongs nowhere in this class."""
        if not self.shift or old in self.canonical:
            return old
        return self.shift + old if self.shift + old in self.canonical else None
