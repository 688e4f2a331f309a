"""Merging in memory: W ← fold(W), then the side paths are gone and a plain model is left.

Nothing is un-merged later by subtraction; whoever may want the base back keeps it. Everything that can be refused is refused before the
first weight is written, by bounds where there are some, else by computing the fold once to be checked and again to be stored; memory stays
at one weight, or a piece of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from byway.core.adapter import Adapter, adapters
from byway.core.attach import detach
from byway.core.copies import keeps_tie, tied_to
from byway.core.folding import Piece, Scratch, pieces, surely_finite
from byway.core.slots import SidePath, Site, base_modules, parent_path, side_paths, slot_of, slots
from byway.core.weights import dense, forget_quantization, is_conv, is_embedding, is_linear, is_quantized, plain, store
from byway.errors import AdapterError, NotMergeable, listed, nearest

__all__ = ["MergeReport", "merge", "refusal"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    merged: tuple[str, ...]
    """Paths of the modules whose weights now hold the adapter."""
    largest_change: float
    """The largest absolute change of any weight."""
    skipped: dict[str, str]
    """Path → why it was left alone (an update that is exactly zero)."""
    notes: tuple[str, ...] = ()
    """What was decided on the way: weights that were tied and no longer are, quantized maps that are ordinary ones now."""

    def __str__(self) -> str:
        lines = [f"merged {len(self.merged)} modules, largest change {self.largest_change:.3g}"]
        lines += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> MergeReport:
    """Fold adapter `name` into the base's weights, in place, and detach it.

    Folds are computed in float32 (float64 for a float64 base) and rounded once. A 4- or 8-bit map becomes an ordinary one, in the dtype of
    the rest of the model, that holds the dequantized weight plus the update, which is what was trained; writing back into 4 bits would lose
    most of the update.

    Raises:
        NotMergeable: a side path has no equal in weights (a prompt, a ladder, a non-linear adapter).
        AdapterError: there is no such adapter, or a merged weight would not be finite; the model is unchanged.
    """
    if name not in adapters(model):
        there = adapters(model)
        raise AdapterError(f"no adapter named {name!r} is attached (there are: {listed(there) or 'none'})", nearest(name, there))
    plan = [(site, side) for site, n, side in side_paths(model) if n == name]
    skipped = _check(adapters(model)[name], plan)
    notes: list[str] = []
    dtype = _dtype_of(model)
    largest, merged, dequantized, scratch = 0.0, [], [], Scratch()
    for site, side in plan:
        if site.path in skipped:
            continue
        site = Site(site.path, model.get_submodule(site.path))  # not the planned module: another side path may have had it replaced
        if is_quantized(site.module):
            dequantized.append(site.path)
        parts = pieces(site.module, [side], scratch)  # of the quantized map, if it is one, so that the sum is rounded once
        site = _writable(model, site, dtype, notes)
        for piece in parts:
            largest = max(largest, piece.change())
            _write(site.module, piece)
        merged.append(site.path)
    detach(model, name)
    if dequantized:
        forget_quantization(model, dequantized)
    return MergeReport(tuple(dict.fromkeys(merged)), largest, skipped, tuple(notes))


def refusal(adapter: Adapter, path: str, error: NotMergeable) -> NotMergeable:
    """The same, with the adapter, its method and the place."""
    what = f"adapter {adapter.name!r} ({type(adapter.method).__name__}) cannot be merged: {path or 'the model itself'}: {error.message}"
    return NotMergeable(what, error.hint)


def _check(adapter: Adapter, plan: list[tuple[Site, SidePath]]) -> dict[str, str]:
    """Fold everything once without writing, as far as bounds leave it open: refuse what cannot be folded or is not finite; name what
    would change nothing."""
    scratch = Scratch()
    changed: set[str] = set()  # two side paths may share a module (a low-rank update and a trained bias)
    for site, side in plan:
        try:
            _refuse_computed(site.module)
            finite = surely_finite(site.module, [side])
            for piece in pieces(site.module, [side], scratch):
                if not (finite or piece.finite):
                    what = f"merging {site.path} would give a {piece.key} that is not finite; the model is unchanged"
                    raise AdapterError(what, "check the adapter")
                if site.path not in changed and piece.differs:
                    changed.add(site.path)
                if finite and site.path in changed:
                    break
        except NotMergeable as error:
            raise refusal(adapter, site.path, error) from error
    return {site.path: "its update is exactly zero" for site, _ in plan if site.path not in changed}


def _refuse_computed(module: nn.Module) -> None:
    """A weight that is made from others at every forward would be made again, without the update."""
    if (is_linear(module) or is_conv(module) or is_embedding(module)) and module._parameters.get("weight") is None:
        what = (
            f"the weight of {type(module).__name__} is computed from other parameters (a parametrization): nothing can be written into it"
        )
        raise NotMergeable(what, "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first")


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of the base that is not quantized, which is what flows between its modules; None where everything is."""
    sizes: Counter[torch.dtype] = Counter()
    for _, module in base_modules(model):
        if not is_quantized(module):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _writable(model: nn.Module, site: Site, dtype: torch.dtype | None, notes: list[str]) -> Site:
    """The site with a weight of its own that can be written: `dtype` instead of quantized, untied from what it was tied to."""
    module = site.module
    if is_quantized(module):
        fresh = plain(module, dtype)
        slot = slot_of(module)
        if slot is not None:
            slot.move(module, fresh)
        parent = model.get_submodule(parent_path(site.path))
        parent._modules[site.path.rpartition(".")[2]] = fresh
        notes.append(f"{site.path}: dequantized, now {str(dense(fresh).dtype).removeprefix('torch.')}")
        return Site(site.path, fresh)
    others = tied_to(model, site.path)
    weight = module._parameters.get("weight")
    if others and weight is not None and not keeps_tie([_hung(model, path) for path in (site.path, *others)]):
        module._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        _forget_tie(model)
        notes.append(f"{site.path} was tied to {', '.join(others)}: it has a weight of its own now")
    return site


def _hung(model: nn.Module, path: str) -> list[SidePath]:
    """The side paths of the module at `path` and of those that it is inside of, which may answer for it."""
    own = [slot for outer, _, slot in slots(model) if outer == path or path.startswith(f"{outer}.")]
    return [side for slot in own for _, side in slot.sides()]


def _forget_tie(model: nn.Module) -> None:
    """Tell transformers not to tie the head again when the merged model is saved and loaded."""
    config = vars(model).get("config")
    if config is not None and vars(config).get("tie_word_embeddings"):
        config.tie_word_embeddings = False


def _write(module: nn.Module, piece: Piece) -> None:
    if piece.key == "weight" and (is_linear(module) or is_conv(module) or is_embedding(module)):
        store(module, piece.after, piece.rows)
    else:
        module.state_dict()[piece.key].copy_(piece.after)
