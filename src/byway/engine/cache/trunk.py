"""The frozen trunk's states, computed once for each document and then looked up, by any batch, epoch and run that needs the same ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.engine.attention.unpack import BOUNDS
from byway.engine.cache import codec, place, units
from byway.engine.cache.codec import Kept
from byway.engine.cache.layout import Stretch, gathered, places, scattered
from byway.engine.cache.shortcut import Reached, Shortcut, capturing, replaying, shortcuts
from byway.engine.cache.store import DiskStore, MemoryStore, Store
from byway.engine.cache.survey import Survey, run, survey
from byway.engine.cache.units import Collate, cut_units
from byway.errors import AdapterError, ConfigError

__all__ = ["LIMIT_GB", "TrunkCache"]

LIMIT_GB = 20.0
"""How much all stores of one root may take, in 10⁹ bytes."""
_SHARE_OF_FREE = 0.9
_FORMAT = 1
_TOLERANCE = 1e-3
"""Relative difference up to which states that are not computed twice alike count as the same."""


class TrunkCache:
    """What a frozen trunk makes of a fixed list of documents, for a model whose adapters act above it.

    ::

        cache = TrunkCache(model, collate=lambda indices: pad(rows, indices), lengths=[len(row) for row in rows], root="cache")
        for indices in batches:
            with cache.replay(indices):
                loss = model(**pad(rows, indices), labels=...).loss

    Args:
        model: with its adapters attached; it stays the object it is.
        collate: indices of documents → what the model is called with to compute their states (no labels), padded or packed.
        lengths: tokens of each document; or how many documents there are, if each has as many states as the model makes of it (images).
        root: the directory in which stores lie; None: in memory, for this object only.
        kept: for each document the positions whose states anybody reads (a head alone); None: all.
        dtype: how states are kept (:mod:`byway.engine.cache.codec`).
        unit_tokens: how many positions are computed and stored together.
        limit_gb: how much all stores below `root` may take; older ones that nobody uses make room.
        shortcut: one of :func:`~byway.engine.cache.shortcut.shortcuts`; default the first.
        note: is told what was repaired or removed.

    Raises:
        AdapterError: nothing can be cached: something that feeds the trunk is trained, or its layers hand on more than hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Collate,
        lengths: Sequence[int] | int,
        *,
        root: str | Path | None = None,
        kept: Sequence[Sequence[int]] | None = None,
        dtype: Kept = "same",
        limit_gb: float = LIMIT_GB,
        shortcut: Shortcut | None = None,
        known: Survey | None = None,
        unit_tokens: int | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.dtype: Kept = dtype
        self.root = None if root is None else Path(root)
        self.limit = int(limit_gb * 1e9)
        self.note = note
        self._device = next(model.parameters()).device
        self._collate: Collate = lambda indices: _without_labels(collate(indices), self._device)
        count = lengths if isinstance(lengths, int) else len(lengths)
        if count == 0:
            raise ConfigError("there are no documents to cache")
        shortest = 0 if isinstance(lengths, int) else min(range(count), key=lambda i: lengths[i])
        self.survey = known or survey(model, shortcut or shortcuts(model)[0], self._collate([shortest]))
        self.shortcut = self.survey.shortcut
        self.units = cut_units([self.survey.rows] * count if isinstance(lengths, int) else lengths, kept, unit_tokens or units.UNIT_TOKENS)
        self.computed = 0
        """Units that were computed by this object; the others were found."""
        self._store: Store | None = None
        self._claim: place.Claim | None = None

    @cached_property
    def key(self) -> str:
        """Under which name the store lies: whatever the states depend on."""
        return hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def depends(self) -> dict[str, str]:
        """What the states depend on, in words and sums."""
        return {
            **self.survey.depends,
            "documents": self.units.digest(self._collate),
            "units": f"{len(self.units.members)}",
            "states": f"{', '.join(self.shortcut.gives)}; width {self.survey.width}",
            "kept as": self.dtype,
            "format": f"{_FORMAT}",
        }

    # ---------------------------------------------------------------- size

    @property
    def bytes(self) -> int:
        """What the whole store takes, headers aside; known before anything is computed."""
        per_row = sum(codec.bytes_per_row(one.width, one.dtype, self.dtype) for one in self._gives())
        return self.units.total * per_row

    @property
    def bytes_per_token(self) -> float:
        """Of the documents' tokens, whether their states are kept or not."""
        return self.bytes / max(sum(self.units.lengths), 1)

    def problem(self) -> str:
        """Why the store cannot be kept below its root, or ``""``. Nothing is written."""
        if self.root is None:
            return ""
        reason = place.writable(self.root)
        if reason:
            return reason
        if self.bytes > self.limit:
            return f"it would take {self.bytes / 1e9:,.1f} GB; engine.cache_limit_gb is {self.limit / 1e9:g}"
        existing = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free + place.evictable(self.root, self.key)
        if self.bytes > _SHARE_OF_FREE * free:
            return f"it would take {self.bytes / 1e9:,.1f} GB; {existing} has room for {free / 1e9:,.1f} GB"
        return ""

    # ---------------------------------------------------------------- open and close

    def open(self) -> None:
        """Make the store ready: room for it, a mark that it is in use. Done by the first use. Raises ConfigError or RunError."""
        if self._store is not None:
            return
        if self.root is None:
            self._store = MemoryStore()
            return
        reason = self.problem()
        if reason:
            raise ConfigError(f"no cache in {self.root}: {reason}", "name another place, raise the limit, or do without it")
        for text in place.make_room(self.root, self.key, self.bytes, self.limit):
            self.note(text)
        self._claim = place.claim(self.root, self.key, self.depends)
        self._store = DiskStore(self._claim.store, self.key, self.note)

    def close(self) -> None:
        """Let go of the store; what was computed stays on the disk."""
        if self._claim is not None:
            self._claim.release()
        self._claim = self._store = None

    def __enter__(self) -> TrunkCache:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- use

    @contextmanager
    def replay(self, indices: Sequence[int], stretches: Sequence[Stretch] | None = None) -> Iterator[None]:
        """Within this context the model, called on a batch of just these documents in this order, does not run its trunk.

        The batch may be padded on either side, or packed; `stretches`: what a packed row is made of if not all documents whole.
        """
        states = self.states(indices)
        lengths = [self.units.lengths[i] for i in indices]
        kept = None if self.units.kept is None else [self.units.kept[i] for i in indices]
        masks: list[Any] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            masks[:] = [kwargs.get("attention_mask")]

        def give(path: str, shape: tuple[int, int]) -> Tensor:
            shape = (shape[0], self.survey.rows) if self.survey.images else shape
            segments = places(shape, lengths, masks[0] if masks else None, stretches)
            return scattered(states[path], segments, shape, kept).to(self._device)

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with replaying(self.model, self.shortcut, self.survey.given, give):
                yield
        finally:
            handle.remove()

    def states(self, indices: Sequence[int]) -> dict[str, list[Tensor]]:
        """Module path → the states (n, d) of each of these documents, on the CPU; what is not there yet is computed."""
        self.open()
        if self._claim is not None:
            self._claim.beat()
        found: dict[str, list[Tensor]] = {path: [] for path in self.shortcut.gives}
        needed = {unit: self._unit(unit) for unit in sorted({self.units.place[i][0] for i in indices})}
        for i in indices:
            unit, first = self.units.place[i]
            for one in self._gives():
                rows = codec.decode(one.path, needed[unit], first, first + self.units.rows(i), self.dtype, one.dtype)
                found[one.path].append(rows)
        return found

    def build(self, on_unit: Callable[[int, int], None] | None = None) -> None:
        """Compute now what is not there yet; `on_unit` is told (units done, units in all)."""
        self.open()
        for unit in range(len(self.units.members)):
            self._unit(unit)
            if on_unit is not None:
                on_unit(unit + 1, len(self.units.members))

    def error(self, indices: Sequence[int]) -> float:
        """‖kept − computed‖ / ‖computed‖ over the states of these documents, whatever has been stored; 0.0 where they are kept exactly."""
        if self.dtype == "same":
            return 0.0
        off = size = 0.0
        exact = self._computed(indices)
        for one in self._gives():
            states = exact[one.path]
            coded = codec.encode(one.path, states, self.dtype)
            again = codec.decode(one.path, coded, 0, len(states), self.dtype, one.dtype)
            off += float((again.double() - states.double()).pow(2).sum())
            size += float(states.double().pow(2).sum())
        return (off / max(size, 1e-300)) ** 0.5

    def spot_check(self) -> str:
        """Compute one unit that lies on the disk again and compare; what does not fit is removed with all the rest, and that is said."""
        self.open()
        if not isinstance(self._store, DiskStore):
            return ""
        there = [unit for unit in self._store.there() if unit < len(self.units.members)]
        if not there:
            return ""
        unit = there[len(there) // 2]
        stored = self._store.get(unit, self._shapes(unit))
        if stored is None:
            return ""
        one, two = self._encoded(unit), None
        if _equal(one, stored):
            return ""
        two = self._encoded(unit)
        if not _equal(one, two) and _close(one, stored):
            return "the trunk does not give the same bits twice on this machine; its cache is used all the same"
        stored = None
        self._store.drop()
        return f"{self._store.directory} does not hold what the trunk gives now; it is made again"

    # ---------------------------------------------------------------- units

    def _gives(self) -> list[Any]:
        return [self.survey.given[path] for path in self.shortcut.gives]

    def _shapes(self, unit: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows = self.units.size(unit)
        return {k: v for one in self._gives() for k, v in codec.parts(one.path, rows, one.width, one.dtype, self.dtype).items()}

    def _unit(self, unit: int) -> Mapping[str, Tensor]:
        store = self._store
        assert store is not None
        shapes = self._shapes(unit)
        found = store.get(unit, shapes)
        if found is not None:
            return found
        encoded = self._encoded(unit)
        self.computed += 1
        store.put(unit, encoded)
        return store.get(unit, shapes) or encoded

    def _encoded(self, unit: int) -> dict[str, Tensor]:
        computed = self._computed(self.units.members[unit])
        return {k: v for path, states in computed.items() for k, v in codec.encode(path, states, self.dtype).items()}

    def _computed(self, documents: Sequence[int]) -> dict[str, Tensor]:
        """Module path → states of these documents one after the other (Σ n, d), on the CPU, computed now."""
        batch = self._collate(documents)
        lengths = [self.units.lengths[i] for i in documents]
        kept = None if self.units.kept is None else [self.units.kept[i] for i in documents]
        found: dict[str, Tensor] = {}

        def seen(path: str, out: Any) -> None:
            states = out if isinstance(out, Tensor) else out[0]
            if states.shape[-1] != self.survey.given[path].width or states.dtype != self.survey.given[path].dtype:
                raise AdapterError(f"{path} gives other states for some documents than for others")
            segments = places((int(states.shape[0]), int(states.shape[1])), lengths, batch.get("attention_mask"))
            found[path] = gathered(states, segments, kept).cpu()

        def done() -> None:
            raise Reached

        with capturing(self.model, {path: self.survey.given[path].calls for path in self.shortcut.gives}, seen, done):
            run(self.model, batch)
        return found


def _without_labels(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) and k not in BOUNDS else v for k, v in batch.items() if k != "labels"}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(
        float((tensor.double() - other[name].double()).norm()) <= _TOLERANCE * float(tensor.double().norm()) for name, tensor in one.items()
    )
