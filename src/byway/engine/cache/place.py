"""The directory in which stores lie, one a key: who uses which, how much there may be, and what goes when there is too much.

::

    ROOT/trunk-KEY/store.json            what the states depend on, for people; its time is that of the last use
    ROOT/trunk-KEY/unit-000000.safetensors …
    ROOT/trunk-KEY/users/HOST-PID-RANDOM  one for each process that reads or writes there; its time is a heartbeat

Only what lies in a directory ``trunk-KEY`` with a ``store.json`` of ours is ever removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byway.disk.atomic import alive, host
from byway.disk.files import atomic_write_text, to_json
from byway.errors import RunError

__all__ = ["Claim", "Entry", "claim", "evictable", "make_room", "size_of", "stores", "writable"]

FORMAT = "byway trunk cache 1"
_FRESH = 3600.0
"""Seconds after its last heartbeat in which a user on another machine counts as alive."""
_BEAT = 60.0


@dataclass(frozen=True)
class Entry:
    """One store on the disk."""

    path: Path
    bytes: int
    used: float
    """When it was last used."""
    busy: bool
    """Whether a process uses it now."""


class Claim:
    """A process's mark in a store that it uses, until :meth:`release`."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.mark = store / "users" / f"{host()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._beaten = 0.0

    def beat(self) -> None:
        """Say that the store is in use; cheap, and written at most once a minute."""
        now = time.monotonic()
        if now - self._beaten < _BEAT:
            return
        self._beaten = now
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.touch()

    def release(self) -> None:
        """Take the mark away; the store was used until now."""
        self.mark.unlink(missing_ok=True)
        record = self.store / "store.json"
        if record.is_file():
            os.utime(record)


def claim(root: Path, key: str, depends: Mapping[str, Any]) -> Claim:
    """Make the store of `key` below `root` if it is not there, and mark it as used. Raises RunError where that cannot be written."""
    store = root / f"trunk-{key}"
    record = store / "store.json"
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            atomic_write_text(record, to_json({"format": FORMAT, "key": key, "depends": dict(depends)}))
        os.utime(record)
        _tidy(root, store)
        own = Claim(store)
        own.beat()
    except OSError as failure:
        raise RunError(f"cannot write the cache {store}: {failure.strerror}", "name another place with engine.cache: DIR") from failure
    return own


def _tidy(root: Path, store: Path) -> None:
    """Remove what processes that were killed have left: half-written units, marks, stores half removed."""
    for entry in store.glob(".unit-*.byway-*"):
        if not _lives_by_name(entry.name.rpartition(".byway-")[2], entry):
            entry.unlink(missing_ok=True)
    for mark in (store / "users").glob("*"):
        if not _lives(mark):
            mark.unlink(missing_ok=True)
    for left in root.glob(".trunk-*.removed-*"):
        shutil.rmtree(left, ignore_errors=True)


def stores(root: Path) -> list[Entry]:
    """The stores below `root`, the one that was used longest ago first."""
    found = [_looked_at(path) for path in (root.glob("trunk-*") if root.is_dir() else ()) if _is_ours(path)]
    return sorted(found, key=lambda store: store.used)


def _is_ours(path: Path) -> bool:
    try:
        return bool(json.loads((path / "store.json").read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _looked_at(path: Path) -> Entry:
    record = path / "store.json"
    try:
        return Entry(path, size_of(path), record.stat().st_mtime, any(_lives(mark) for mark in (path / "users").glob("*")))
    except FileNotFoundError:  # somebody is removing it
        return Entry(path, 0, 0.0, True)


def size_of(path: Path) -> int:
    """Bytes of the units in a store; 0 where there is none."""
    total = 0
    for file in path.glob("unit-*") if path.is_dir() else ():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue  # replaced this moment
    return total


def _lives(mark: Path) -> bool:
    return _lives_by_name(mark.name, mark)


def _lives_by_name(name: str, file: Path) -> bool:
    """Whether the process HOST-PID-RANDOM runs; on another machine, whether `file` was touched lately."""
    home, _, rest = name.partition("-")
    process = rest.partition("-")[0]
    if home == host() and process.isdigit():
        return alive(int(process))
    try:
        return time.time() - file.stat().st_mtime < _FRESH
    except FileNotFoundError:
        return False


def make_room(root: Path, key: str, needed: int, limit: int) -> list[str]:
    """Remove stores other than that of `key`, oldest first and none in use, until `needed` bytes for it fit into `limit`; what was done."""
    own = root / f"trunk-{key}"
    others = [store for store in stores(root) if store.path != own]
    total = needed + sum(store.bytes for store in others)
    notes: list[str] = []
    for store in others:
        if total <= limit:
            break
        if store.busy:
            continue
        _removed(store.path)
        total -= store.bytes
        notes.append(f"removed {store.path}: {store.bytes / 1e6:,.0f} MB of an older cache, to stay below engine.cache_limit_gb")
    return notes


def _removed(path: Path) -> None:
    """Out of sight in one step, then deleted."""
    aside = path.with_name(f".{path.name}.removed-{os.urandom(4).hex()}")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def evictable(root: Path, key: str) -> int:
    """Bytes below `root` that :func:`make_room` may free, and those that the store of `key` itself has already."""
    own = root / f"trunk-{key}"
    return sum(store.bytes for store in stores(root) if store.path == own or not store.busy)


def writable(root: Path) -> str:
    """Why nothing can be written below `root`, or ``""``; nothing is made."""
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file, not a directory"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"
