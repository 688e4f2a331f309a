"""Merge an adapter in memory: W ← fold(W), then remove the side paths, which leaves a plain model.

A merge cannot be undone by subtraction; keep the base if you may need it. Every error is raised before the first weight
is written: from bounds where there are any, else by computing each fold twice, once to check it and once to store it.
Peak extra memory is one weight, or a piece of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from byway.core.adapter import Adapter
from byway.core.attach import detach, owner_of
from byway.core.copies import ends_of, holders, untied_note
from byway.core.families.facts import inside
from byway.core.folding import Scratch, changed_tensors, pieces
from byway.core.slots import SidePath, Site, base_modules, parent_path, side_paths, slot_of, slots
from byway.core.token_rows import keeps_tie
from byway.core.weights import dense, forget_quantization, is_map, is_quantized, plain, store
from byway.errors import NotMergeable

__all__ = ["MergeReport", "merge", "refusal"]


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge."""

    merged: tuple[str, ...]
    """Paths of the modules into whose weights the adapter was merged."""
    largest_change: float
    """Largest absolute change of any weight."""
    skipped: dict[str, str]
    """Path → why the module was left unchanged (its update is exactly zero)."""
    notes: tuple[str, ...] = ()
    """Side effects: tied weights that were untied, quantized maps that were dequantized."""

    def __str__(self) -> str:
        lines = [f"merged {len(self.merged)} modules, largest change {self.largest_change:.3g}"]
        lines += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> MergeReport:
    """Fold adapter `name` into the base's weights, in place, and detach it.

    Folds are computed in float32 (float64 for a float64 base) and rounded once. A 4- or 8-bit map is replaced by an
    nn.Linear, in the dtype of the rest of the model, that holds the dequantized weight plus the update, which is what
    was trained; quantizing the sum to 4 bits would lose most of the update.

    Raises:
        NotMergeable: a side path cannot be expressed as a change of weights (a prompt, a ladder, a non-linear adapter).
        AdapterError: there is no such adapter, or a merged weight would not be finite; the model is unchanged.
    """
    adapter = owner_of(model, name)[1].adapters[name]
    plan = [(site, side) for site, n, side in side_paths(model) if n == name]
    changed = _check(adapter, plan)
    skipped = {site.path: "its update is exactly zero" for site, _ in plan if not changed[site.path]}
    notes: list[str] = []
    dtype = _dtype_of(model)
    largest, merged, dequantized, scratch = 0.0, [], [], Scratch()
    for site, side in plan:
        if site.path in skipped:
            continue
        module = model.get_submodule(site.path)  # not site.module, which an earlier side path may have had replaced
        if is_quantized(module):
            dequantized.append(site.path)
        parts = pieces(module, [side], scratch)  # from the quantized map, so that the sum is rounded once
        module = _writable(model, site.path, module, dtype, notes)
        _untie(model, site.path, changed[site.path], notes)
        for piece in parts:
            largest = max(largest, piece.change())
            if piece.key == "weight" and is_map(module):
                store(module, piece.after, piece.rows)
            else:
                module.state_dict()[piece.key].copy_(piece.after)
        merged.append(site.path)
    detach(model, name)
    if dequantized:
        forget_quantization(model, dequantized)
    return MergeReport(tuple(dict.fromkeys(merged)), largest, skipped, tuple(notes))


def refusal(adapter: Adapter, path: str, error: NotMergeable) -> NotMergeable:
    """Return `error` with the adapter's name, its method and the module's path added to the message."""
    what = f"adapter {adapter.name!r} ({type(adapter.method).__name__}) cannot be merged: {path or 'the model itself'}: {error.message}"
    return NotMergeable(what, error.hint)


def _check(adapter: Adapter, plan: list[tuple[Site, SidePath]]) -> dict[str, set[str]]:
    """Return path → names of the tensors that change. Raise if a side path cannot be folded or is not finite."""
    scratch = Scratch()
    # two side paths may share a module (a low-rank update and a trained bias)
    changed: dict[str, set[str]] = {site.path: set() for site, _ in plan}
    for site, side in plan:
        module = site.module
        try:
            if is_map(module) and module._parameters.get("weight") is None:  # a parametrization would recompute it without the update
                computed = f"the weight of {type(module).__name__} is computed from other parameters (a parametrization)"
                hint = "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
                raise NotMergeable(f"{computed} and cannot be written", hint)
            changed[site.path].update(changed_tensors(site.path, module, [side], scratch, "the model is unchanged"))
        except NotMergeable as error:
            raise refusal(adapter, site.path, error) from error
    return changed


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the most common dtype of the parameters that are not quantized; None if there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for _, module in base_modules(model):
        if not is_quantized(module):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _writable(model: nn.Module, path: str, module: nn.Module, dtype: torch.dtype | None, notes: list[str]) -> nn.Module:
    """Dequantize the weight at `path` to `dtype`. Return the module whose tensors can be written."""
    if is_quantized(module):
        fresh = plain(module, dtype)
        slot = slot_of(module)
        if slot is not None:
            slot.move(module, fresh)
        parent = model.get_submodule(parent_path(path))
        parent._modules[path.rpartition(".")[2]] = fresh
        notes.append(f"{path}: dequantized, now {str(dense(fresh).dtype).removeprefix('torch.')}")
        return fresh
    return module


def _untie(model: nn.Module, path: str, keys: Collection[str], notes: list[str]) -> None:
    """Give the module at `path` tensors `keys` of its own where modules outside hold them too and change otherwise."""
    shared = holders(model)
    for key in keys:
        within, _, leaf = key.rpartition(".")
        owner = ".".join(part for part in (path, within) if part)
        tensor = model.get_submodule(owner)._parameters.get(leaf)
        if tensor is None or id(tensor) not in shared:
            continue
        ends = shared[id(tensor)]
        others = [end for end in ends_of(model, ends) if not inside(end, path)]
        if not others or keeps_tie([_around(model, end) for end in (owner, *others)]):
            continue
        own = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
        for end, name in ends:
            if inside(end, path):
                model.get_submodule(end)._parameters[name] = own
        notes.append(untied_note(owner, others))
        config = vars(model).get("config")
        if config is not None and vars(config).get("tie_word_embeddings"):
            config.tie_word_embeddings = False  # else transformers ties the head again on loading the merged model
            _untie_all(model)


def _untie_all(model: nn.Module) -> None:
    """Give every end of a tie a tensor of its own: without the flag in the configuration, loading restores none."""
    for ends in holders(model).values():
        for path, name in ends[1:]:
            module = model.get_submodule(path)
            tensor = module._parameters[name]
            assert tensor is not None
            module._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _around(model: nn.Module, end: str) -> list[SidePath]:
    """Return the side paths at `end` and at the modules around it, which may compute its output."""
    return [side for outer, _, slot in slots(model) if inside(end, outer) for _, side in slot.sides()]
