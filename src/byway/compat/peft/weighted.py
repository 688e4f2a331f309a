"""``add_weighted_adapter``: which tensors of which adapters are combined; the operators are in :mod:`byway.workshop.combine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.config import LoraConfig
from byway.compat.peft.session import Session
from byway.compat.peft.state import layer_of
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath, base_modules, side_paths, slot_of
from byway.errors import AdapterError, listed
from byway.methods.lowrank.sides import LowRank
from byway.workshop.combine import OPERATORS, combine, low_rank_of, root

__all__ = ["add_weighted_adapter"]

Sides = Mapping[str, SidePath]


def add_weighted_adapter(
    session: Session,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Any = "total",
) -> None:
    """A new, frozen adapter from others: ``cat`` (exact), ``svd``, ``linear``, ``ties``, ``dare_linear``, ``dare_ties``,
    ``magnitude_prune``, and the last four with ``_svd`` on the updates instead of on the factors.

    Raises:
        AdapterError: unlike ranks where equal ones are needed, an unknown type, or two adapters that train the same module whole.
    """
    if adapter_name in session.configs:
        return
    for name in adapters:
        session.known(name)
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"there are {len(adapters)} adapters and {len(weights)} weights")
    kinds = {str(session.configs[name].peft_type) for name in adapters}
    if len(kinds) > 1:
        raise AdapterError(f"adapters of different kinds cannot be combined: {listed(kinds)}")
    _check_copies(session, adapters)
    if kinds == {"IA3"}:
        _scaled_vectors(session, adapters, weights, adapter_name)
        return
    if kinds != {"LORA"}:
        raise AdapterError(f"adapters of the kind {listed(kinds)} cannot be combined")
    options = {"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver}
    kind = "linear" if len(adapters) == 1 else combination_type
    rank = _rank(session, adapters, kind, svd_rank)
    _add(session, adapters, adapter_name, rank)
    for module, sides in _sites(session, adapters, adapter_name):
        target = sides[adapter_name]
        own = [(sides[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in sides]
        if not isinstance(target, LowRank):
            continue
        low = [(side, weight) for side, weight in own if isinstance(side, LowRank)]
        a, b = _combined(target, low, kind, density, majority_sign_method, options)
        with torch.no_grad():
            target.lora_A.zero_()
            target.lora_B.zero_()
            target.lora_A[: a.shape[0]].copy_(a)
            target.lora_B[:, : b.shape[1]].copy_(b)
        target.scale = 1.0
        layer_of(module).scales[adapter_name] = 1.0
    _freeze(session, adapter_name)


def _check_copies(session: Session, adapters: Sequence[str]) -> None:
    shared = 0
    for _, _, slot in session.slots():
        shared += sum(isinstance(side, TrainedCopy) for name, side in slot.sides() if name in adapters) > 1
    if shared:
        raise AdapterError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but found {shared} such instance(s)."
        )


def _rank(session: Session, adapters: Sequence[str], kind: str, svd_rank: int | None) -> int:
    found = [[side.rank for _, own, side in side_paths(session.model) if own == name and isinstance(side, LowRank)] for name in adapters]
    ranks = [max(own, default=0) for own in found]
    if kind in OPERATORS:
        if len(set(ranks)) > 1:
            raise AdapterError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_linear or dare_ties."
            )
        return ranks[0]
    if kind == "cat":
        return sum(ranks)
    if kind == "svd" or kind.removesuffix("_svd") in OPERATORS.keys() - {"linear"}:
        return svd_rank or max(ranks)
    raise AdapterError(f"Invalid combination_type: {kind}", f"there are: {listed([*OPERATORS, 'cat', 'svd'])}, and most with _svd")


def _add(session: Session, adapters: Sequence[str], name: str, rank: int) -> None:
    """Hang an empty adapter of `rank` on everything that any of `adapters` adapts."""
    sites = {s.path for s, own, side in side_paths(session.model) if own in adapters and isinstance(side, LowRank)}
    saved = sorted({s.path for s, own, side in side_paths(session.model) if own in adapters and isinstance(side, TrainedCopy)})
    first = session.configs[adapters[0]]
    assert isinstance(first, LoraConfig)
    written = [vars(session.configs[n]).get("target_modules") for n in adapters]
    config = replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        init_lora_weights=True,
        target_modules=sorted(sites),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved or None,
        alpha_pattern={},
        rank_pattern={},
    )
    session.add(config, name)
    if all(isinstance(targets, set) for targets in written):
        config.target_modules = {target for targets in written if targets for target in targets}
    modules = dict(base_modules(session.model))
    for path in saved:
        slot = slot_of(modules[path])
        copies = [] if slot is None else [(own, side) for own, side in slot.sides() if isinstance(side, TrainedCopy)]
        source = next((side for own, side in copies if own in adapters), None)
        for own, side in copies:
            if own == name and source is not None:
                side.copy.load_state_dict(source.copy.state_dict())


def _sites(session: Session, adapters: Sequence[str], name: str) -> list[tuple[nn.Module, Sides]]:
    found = []
    for _, module, slot in session.slots():
        sides = {own: side for own, side in slot.sides() if own in (*adapters, name)}
        if name in sides:
            found.append((module, sides))
    return found


def _combined(
    target: LowRank, own: Sequence[tuple[LowRank, float]], kind: str, density: float | None, sign: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    if not own:
        raise AdapterError("No matching LoRAs found.")
    if kind == "cat":
        return (
            torch.cat([side.lora_A.detach() * (weight * side.scale) for side, weight in own]),
            torch.cat([side.lora_B.detach() for side, _ in own], dim=1),
        )
    if kind in OPERATORS:
        shares = [weight * side.scale for side, weight in own]
        signed = [root(share) * (1 if share >= 0 else -1) for share in shares]
        a = combine(kind, [side.lora_A.detach() for side, _ in own], signed, density=density, sign=sign)
        b = combine(kind, [side.lora_B.detach() for side, _ in own], [root(share) for share in shares], density=density, sign=sign)
        return a, b
    operator = "linear" if kind == "svd" else kind.removesuffix("_svd")
    delta = combine(operator, [side.product() for side, _ in own], [weight for _, weight in own], density=density, sign=sign)
    a, b = low_rank_of(delta, target.rank, **options)
    return a.reshape(target.lora_A.shape), b.reshape(target.lora_B.shape)


def _scaled_vectors(session: Session, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """(IA)³: Σ w_i l_i."""
    from copy import deepcopy

    session.add(deepcopy(session.configs[adapters[0]]), name)
    for _, sides in _sites(session, adapters, name):
        for own, parameter in sides[name].named_parameters():
            terms = [dict(sides[n].named_parameters())[own] * w for n, w in zip(adapters, weights, strict=True) if n in sides]
            with torch.no_grad():
                parameter.copy_(torch.stack(terms).sum(0))
    _freeze(session, name)


def _freeze(session: Session, name: str) -> None:
    for _, own, side in side_paths(session.model):
        if own == name:
            side.requires_grad_(False)
