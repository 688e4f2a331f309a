"""The frozen-trunk cache: the states of each document are computed once and looked up in later epochs and runs."""

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
from byway.engine.cache import root as stores
from byway.engine.cache import units
from byway.engine.cache.shortcut import Given, Reached, Shortcut, capturing, replaying, shortcuts
from byway.engine.cache.store import DiskStore, Kept, MemoryStore, bytes_per_row, decode, encode, parts
from byway.engine.cache.survey import Survey, run, survey
from byway.engine.cache.units import Collate, Stretch, cut_units, gathered, pieces, scattered
from byway.errors import AdapterError, ConfigError

__all__ = ["LIMIT_GB", "TrunkCache"]

LIMIT_GB = 20.0
"""Most space that all stores of one root may take, in 10⁹ bytes."""
_SHARE_OF_FREE = 0.9
_FORMAT = 1
_TOLERANCE = 1e-3
"""If the trunk is not deterministic, states that differ by at most this much (relative) count as the same."""


class TrunkCache:
    """The states that a frozen trunk computes for a fixed list of documents, for a model whose adapters act above it.

    ::

        lengths = [len(row) for row in rows]
        cache = TrunkCache(model, collate=lambda indices: pad(rows, indices), lengths=lengths, root="cache")
        for indices in batches:
            with cache.replay(indices):
                loss = model(**pad(rows, indices), labels=...).loss

    Args:
        model: the model with its adapters attached. It is not changed.
        collate: indices of documents → arguments of the model to compute their states (no labels), padded or packed.
        lengths: tokens of each document; or the number of documents, if the model makes the same number of states of
            each (images).
        root: the directory of the stores; None: in memory, for this object only.
        kept: for each document the positions whose states are read (by a head); None: all.
        dtype: how states are stored (:mod:`byway.engine.cache.store`).
        limit_gb: most space that all stores below `root` may take. Least recently used stores are evicted; stores in
            use never are.
        shortcut: one of :func:`~byway.engine.cache.shortcut.shortcuts`; default the first.
        known: the survey of the shortcut, if it has been made.
        unit_tokens: positions that are computed and stored together.
        note: called with a line for each repair or eviction.

    Raises:
        AdapterError: nothing can be cached: something below is trained, or layers return more than hidden states.
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
        self._collate: Collate = lambda indices: {
            k: v.to(self._device) if isinstance(v, Tensor) and k not in BOUNDS else v for k, v in collate(indices).items() if k != "labels"
        }
        count = lengths if isinstance(lengths, int) else len(lengths)
        if count == 0:
            raise ConfigError("there are no documents to cache", "pass at least one document")
        shortest = 0 if isinstance(lengths, int) else min(range(count), key=lambda i: lengths[i])
        self.survey = known or survey(model, shortcut or shortcuts(model)[0], self._collate([shortest]))
        self.shortcut = self.survey.shortcut
        self.units = cut_units([self.survey.rows] * count if isinstance(lengths, int) else lengths, kept, unit_tokens or units.UNIT_TOKENS)
        self.computed = 0
        """Units computed by this object; the others were found in the store."""
        self._store: DiskStore | MemoryStore | None = None
        self._claim: stores.Claim | None = None

    @cached_property
    def key(self) -> str:
        """The name of the store: a hash of all that the states depend on."""
        return hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def depends(self) -> dict[str, str]:
        """All that the states depend on, as text and checksums."""
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
        """Size of the whole store without file headers; known before anything is computed."""
        per_row = sum(bytes_per_row(one.width, one.dtype, self.dtype) for one in self._gives())
        return self.units.total * per_row

    @property
    def bytes_per_token(self) -> float:
        """Size per token of the documents, with or without states kept."""
        return self.bytes / max(sum(self.units.lengths), 1)

    def problem(self) -> str:
        """Return why the store cannot be kept below its root, or ``""``. Writes nothing."""
        if self.root is None:
            return ""
        reason = stores.writable(self.root)
        if reason:
            return reason
        if self.bytes > self.limit:
            return f"it would take {self.bytes / 1e9:,.1f} GB; engine.cache_limit_gb is {self.limit / 1e9:g}"
        existing = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        free = shutil.disk_usage(existing).free + stores.evictable(self.root, self.key)
        if self.bytes > _SHARE_OF_FREE * free:
            return f"it would take {self.bytes / 1e9:,.1f} GB; {existing} has room for {free / 1e9:,.1f} GB"
        return ""

    # ---------------------------------------------------------------- open and close

    def open(self) -> None:
        """Make room for the store and mark it as in use. The first use calls this. Raises ConfigError or RunError."""
        if self._store is not None:
            return
        if self.root is None:
            self._store = MemoryStore()
            return
        reason = self.problem()
        if reason:
            raise ConfigError(
                f"the cache cannot be kept in {self.root}: {reason}", "use another directory, raise the limit, or use no cache"
            )
        for text in stores.make_room(self.root, self.key, self.bytes, self.limit):
            self.note(text)
        self._claim = stores.claim(self.root, self.key, self.depends)
        self._store = DiskStore(self._claim.store, self.key, self.note)

    def close(self) -> None:
        """Release the store. Its files stay on the disk."""
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
        """Skip the trunk within this context, in which the model is called on a batch of these documents in this order.

        Args:
            indices: the documents. The batch may be padded on either side, or packed.
            stretches: the parts of documents that a packed row is made of; None: all documents as a whole.
        """
        states = self.states(indices)
        lengths = [self.units.lengths[i] for i in indices]
        kept = None if self.units.kept is None else [self.units.kept[i] for i in indices]
        masks: list[Any] = []

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            masks[:] = [kwargs.get("attention_mask")]

        def give(path: str, shape: tuple[int, int]) -> Tensor:
            shape = (shape[0], self.survey.rows) if self.survey.images else shape
            found = pieces(shape, lengths, masks[0] if masks else None, stretches)
            return scattered(states[path], found, shape, kept).to(self._device)

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with replaying(self.model, self.shortcut, self.survey.given, give):
                yield
        finally:
            handle.remove()

    def states(self, indices: Sequence[int]) -> dict[str, list[Tensor]]:
        """Return the states (n, d) of these documents on the CPU, by module path; computes missing units."""
        self.open()
        if self._claim is not None:
            self._claim.beat()
        found: dict[str, list[Tensor]] = {path: [] for path in self.shortcut.gives}
        needed = {unit: self._unit(unit) for unit in sorted({self.units.place[i][0] for i in indices})}
        for i in indices:
            unit, first = self.units.place[i]
            for one in self._gives():
                rows = decode(one.path, needed[unit], first, first + self.units.rows(i), self.dtype, one.dtype)
                found[one.path].append(rows)
        return found

    def build(self, on_unit: Callable[[int, int], None] | None = None) -> None:
        """Compute all missing units now; calls ``on_unit(units done, units in all)`` after each."""
        self.open()
        for unit in range(len(self.units.members)):
            self._unit(unit)
            if on_unit is not None:
                on_unit(unit + 1, len(self.units.members))

    def error(self, indices: Sequence[int]) -> float:
        """Return ‖kept − computed‖ / ‖computed‖ over the states of these documents, whatever is in the store."""
        if self.dtype == "same":
            return 0.0
        off = size = 0.0
        exact = self._computed(indices)
        for one in self._gives():
            states = exact[one.path]
            again = decode(one.path, encode(one.path, states, self.dtype), 0, len(states), self.dtype, one.dtype)
            off += float((again.double() - states.double()).pow(2).sum())
            size += float(states.double().pow(2).sum())
        return (off / max(size, 1e-300)) ** 0.5

    def spot_check(self) -> str:
        """Recompute one unit of the disk store. If it differs, remove all. Returns a line about it, or ``""``."""
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
        computed = self._encoded(unit)
        if _equal(computed, stored):
            return ""
        if not _equal(computed, self._encoded(unit)) and _close(computed, stored):
            return "the trunk does not return the same bits twice on this machine; its cache is used all the same"
        stored = None  # close its memory map
        self._store.drop()
        return f"{self._store.directory} does not hold what the trunk computes now; it is made again"

    # ---------------------------------------------------------------- units

    def _gives(self) -> list[Given]:
        return [self.survey.given[path] for path in self.shortcut.gives]

    def _shapes(self, unit: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows = self.units.size(unit)
        return {k: v for one in self._gives() for k, v in parts(one.path, rows, one.width, one.dtype, self.dtype).items()}

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
        return {k: v for path, states in computed.items() for k, v in encode(path, states, self.dtype).items()}

    def _computed(self, documents: Sequence[int]) -> dict[str, Tensor]:
        """Compute the states of these documents, one after the other (Σ n, d), on the CPU; by module path."""
        batch = self._collate(documents)
        lengths = [self.units.lengths[i] for i in documents]
        kept = None if self.units.kept is None else [self.units.kept[i] for i in documents]
        found: dict[str, Tensor] = {}

        def seen(path: str, out: Any) -> None:
            states = out if isinstance(out, Tensor) else out[0]
            if states.shape[-1] != self.survey.given[path].width or states.dtype != self.survey.given[path].dtype:
                raise AdapterError(f"{path} returns states of another width or dtype for some documents")
            there = pieces((int(states.shape[0]), int(states.shape[1])), lengths, batch.get("attention_mask"))
            found[path] = gathered(states, there, kept).cpu()

        def done() -> None:
            raise Reached

        with capturing(self.model, {path: self.survey.given[path].calls for path in self.shortcut.gives}, seen, done):
            run(self.model, batch)
        return found


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(
        float((tensor.double() - other[name].double()).norm()) <= _TOLERANCE * float(tensor.double().norm()) for name, tensor in one.items()
    )
