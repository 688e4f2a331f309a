"""EVA: A starts as the main directions of what goes into a map, and the ranks go where inputs vary most along few directions.

For each map, with X the rows of its inputs over the calibration batches and X̄ their mean: X − X̄ = U S Vᵀ, A = V[:, :r]ᵀ, B = 0. The ratio
S_i²/‖X − X̄‖² says how much of the inputs direction i explains; over all maps together the largest ratios win a rank each, at most rho·r in
one map and as many in all as there were; a map may end with none and is then not adapted. alpha/r stays what it was.

The decomposition is streamed: a batch's rows are stacked under what is kept so far, S·Vᵀ and one row for the shift of the mean, and the
stack is decomposed again, so that memory stays at 64 + 4·rho·r + rows of a batch. Each batch is seen once. Source: Paischer et al., arXiv
2410.07170; the update with a mean: Ross et al., IJCV 2008.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.slots import Site, first
from byway.errors import AdapterError

__all__ = ["Directions", "directions", "redistribute", "token_mask"]

IGNORED = -100
_SPARE = 64
"""Directions that are carried along from batch to batch beside four times those wanted: what is dropped early cannot come back."""


class Directions:
    """The main directions of rows that arrive in batches, about their running mean."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.count = 0
        self.mean = torch.zeros(0)
        self.variance = 0.0
        """‖X − X̄‖², over all rows so far."""
        self.values = torch.zeros(0)
        self.vectors = torch.zeros(0)
        """(kept, in), orthonormal rows, by falling singular value."""

    def add(self, rows: Tensor) -> None:
        """Take in `rows` (n, in), n > 0."""
        rows = rows.detach().double()
        n, mean = rows.shape[0], rows.mean(0)
        centered = rows - mean
        if self.count == 0:
            stack, shift = centered, 0.0
            self.mean = mean
        else:
            weight = self.count * n / (self.count + n)
            between = weight**0.5 * (self.mean - mean)
            stack = torch.cat([self.values[:, None] * self.vectors, centered, between[None]])
            shift = float(between.pow(2).sum())
            self.mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.variance += float(centered.pow(2).sum()) + shift
        self.count += n
        _, values, vectors = torch.linalg.svd(stack, full_matrices=False)
        there = values > values[0] * 1e-10 if values.numel() else values > 0
        keep = min(self.keep, int(there.sum()))
        self.values, self.vectors = values[:keep], vectors[:keep]

    def ratios(self) -> Tensor:
        """The share of the variance along each kept direction, falling."""
        return self.values.square() / self.variance if self.variance > 0 else self.values


def directions(
    model: nn.Module, sites: Sequence[Site], keep: Mapping[str, int], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Directions]:
    """Path → the main `keep[path]` directions of what goes into the map there, over all `batches`; the model is left as it was.

    Maps that are given the very same tensor (queries, keys and values) are decomposed once.
    """
    found: dict[str, Directions] = {}
    width = {site.path: keep[site.path] for site in sites}
    stacks = {path: at[0] for path in width if (at := facts(model).layer_of(path)) is not None}
    two = len(facts(model).stacks) > 1
    for batch in batches:
        arrived: dict[str, Tensor] = {}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with _listening(sites, arrived), _evaluating(model), torch.no_grad():
            model(**inputs)
        groups: dict[int, list[str]] = {}
        for path, tensor in arrived.items():
            groups.setdefault(id(tensor), []).append(path)
        for paths in groups.values():
            key = paths[0]
            own = found.get(key)
            if own is None:
                own = Directions(_SPARE + 4 * max(width[path] for path in paths))
                found |= dict.fromkeys(paths, own)
            rows = _rows(arrived[key], token_mask(batch, labels=not two), stack=stacks.get(key, "") if two else "")
            if rows.shape[0]:
                own.add(rows)
    silent = [path for path in width if path not in found or found[path].count == 0]
    if silent:
        raise AdapterError(
            f"init eva: nothing went into {', '.join(silent[:5])} in the calibration batches", "exclude them, or pass other batches"
        )
    return found


def token_mask(batch: Mapping[str, Any], *, labels: bool) -> Tensor | None:
    """(b, t) bool, which tokens of a batch count: no padding, and with `labels` only those whose label is not -100; None: all."""
    mask = batch.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    wanted = batch.get("labels")
    ids = batch.get("input_ids")
    if labels and isinstance(wanted, Tensor) and isinstance(ids, Tensor) and wanted.ndim == 2 and wanted.shape == ids.shape:
        counted = wanted != IGNORED
        mask = counted if mask is None else mask & counted
    return mask


def _rows(tensor: Tensor, mask: Tensor | None, *, stack: str) -> Tensor:
    """(rows, in): the tokens of `tensor` that count. In a model of two stacks the mask is about the encoder."""
    if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == mask.shape and stack in ("", "encoder"):
        return tensor[mask.to(tensor.device)]
    return tensor.reshape(-1, tensor.shape[-1])


@contextmanager
def _listening(sites: Sequence[Site], arrived: dict[str, Tensor]) -> Iterator[None]:
    """Within this context what goes into each site is kept in `arrived`, by path."""

    def listener(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else first(kwargs)
            if isinstance(given, Tensor):
                arrived.setdefault(path, given)

        return hook

    handles = [site.module.register_forward_pre_hook(listener(site.path), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def redistribute(found: Mapping[str, Directions], ranks: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Path → rank: the largest ratios of all maps win one each, Σ `ranks` in all, at most `most[path]` in one map; 0 is possible."""
    order = [(-float(ratio), place, path) for place, path in enumerate(ranks) for ratio in found[path].ratios()[: most[path]]]
    chosen = [path for _, _, path in sorted(order)[: sum(ranks.values())]]
    return {path: chosen.count(path) for path in ranks}
