"""The root directory of stores, one per key: which processes use them, how much space they take, and which are evicted.

::

    ROOT/trunk-KEY/store.json            what the states depend on, for people; its time is that of the last use
    ROOT/trunk-KEY/unit-000000.safetensors …
    ROOT/trunk-KEY/users/HOST-PID-RANDOM  one per process that uses the store; its time is a heartbeat

Only directories ``trunk-KEY`` with a ``store.json`` written by Byway are ever removed.
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

from byway.core.disk.atomic import alive, host
from byway.core.disk.files import atomic_write_text, to_json
from byway.errors import RunError

__all__ = ["Claim", "Entry", "claim", "evictable", "make_room", "stores", "writable"]

FORMAT = "byway trunk cache 1"
_FRESH = 3600.0
"""Seconds after its last heartbeat for which a process on another machine counts as alive."""
_BEAT = 60.0


@dataclass(frozen=True)
class Entry:
    """One store on the disk."""

    path: Path
    bytes: int
    used: float
    """Time of the last use."""
    busy: bool
    """True if a process uses it now."""


class Claim:
    """The mark of a process in a store that it uses, until :meth:`release`."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.mark = store / "users" / f"{host()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._beaten = 0.0

    def beat(self) -> None:
        """Renew the mark. Cheap: it is written at most once a minute."""
        now = time.monotonic()
        if now - self._beaten < _BEAT:
            return
        self._beaten = now
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.touch()

    def release(self) -> None:
        """Remove the mark and set the time of the last use."""
        self.mark.unlink(missing_ok=True)
        record = self.store / "store.json"
        if record.is_file():
            os.utime(record)


def claim(root: Path, key: str, depends: Mapping[str, Any]) -> Claim:
    """Mark the store of `key` below `root` as used, creating it if necessary. Raises RunError if that fails."""
    store = root / f"trunk-{key}"
    record = store / "store.json"
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            atomic_write_text(record, to_json({"format": FORMAT, "key": key, "depends": dict(depends)}))
        os.utime(record)
        # remove what killed processes have left: half-written units, marks, half-removed stores
        for entry in store.glob(".unit-*.byway-*"):
            if not _lives(entry.name.rpartition(".byway-")[2], entry):
                entry.unlink(missing_ok=True)
        for mark in (store / "users").glob("*"):
            if not _lives(mark.name, mark):
                mark.unlink(missing_ok=True)
        for left in root.glob(".trunk-*.removed-*"):
            shutil.rmtree(left, ignore_errors=True)
        own = Claim(store)
        own.beat()
    except OSError as failure:
        raise RunError(f"cannot write the cache {store}: {failure.strerror}", "set another directory with engine.cache: DIR") from failure
    return own


def stores(root: Path) -> list[Entry]:
    """Return the stores below `root`, least recently used first."""
    found: list[Entry] = []
    for path in root.glob("trunk-*") if root.is_dir() else ():
        record = path / "store.json"
        try:
            if json.loads(record.read_text(encoding="utf-8"))["format"] != FORMAT:
                continue
        except (OSError, ValueError, KeyError, TypeError):
            continue
        try:
            busy = any(_lives(mark.name, mark) for mark in (path / "users").glob("*"))
            found.append(Entry(path, _size(path), record.stat().st_mtime, busy))
        except FileNotFoundError:  # another process is removing it
            found.append(Entry(path, 0, 0.0, True))
    return sorted(found, key=lambda store: store.used)


def _size(path: Path) -> int:
    """Return the bytes of the units in a store; 0 if it does not exist."""
    total = 0
    for file in path.glob("unit-*") if path.is_dir() else ():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue  # replaced at this moment
    return total


def _lives(name: str, file: Path) -> bool:
    """True if the process HOST-PID-RANDOM runs; on another machine, if `file` was touched recently."""
    home, _, rest = name.partition("-")
    process = rest.partition("-")[0]
    if home == host() and process.isdigit():
        return alive(int(process))
    try:
        return time.time() - file.stat().st_mtime < _FRESH
    except FileNotFoundError:
        return False


def make_room(root: Path, key: str, needed: int, limit: int) -> list[str]:
    """Remove stores until `needed` bytes for the store of `key` fit into `limit`; returns one line per store removed.

    Removes the least recently used first, never one in use or that of `key`.
    """
    own = root / f"trunk-{key}"
    others = [store for store in stores(root) if store.path != own]
    total = needed + sum(store.bytes for store in others)
    notes: list[str] = []
    for store in others:
        if total <= limit:
            break
        if store.busy:
            continue
        # renamed first, so that nobody finds half a store
        aside = store.path.with_name(f".{store.path.name}.removed-{os.urandom(4).hex()}")
        try:
            os.replace(store.path, aside)
        except FileNotFoundError:
            pass
        else:
            shutil.rmtree(aside, ignore_errors=True)
        total -= store.bytes
        notes.append(f"removed {store.path}: {store.bytes / 1e6:,.0f} MB of an older cache, to stay below engine.cache_limit_gb")
    return notes


def evictable(root: Path, key: str) -> int:
    """Return the bytes below `root` that :func:`make_room` may free, plus those that the store of `key` already has."""
    own = root / f"trunk-{key}"
    return sum(store.bytes for store in stores(root) if store.path == own or not store.busy)


def writable(root: Path) -> str:
    """Return why nothing can be written below `root`, or ``""``. Creates nothing."""
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    if not place.is_dir():
        return f"{place} is a file, not a directory"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} is not writable"
