"""One writer per directory: a lock that names its holder and that the system releases when the process ends.

The lock is `flock` on ``.run.lock``. The kernel releases it however the process ends, so kill -9 leaves nothing to
recover from, a reused process id deceives nobody, and containers that do not see each other's processes exclude each
other. The file's content (process, start time, host) serves messages, and decides in the two cases in which `flock`
does not: the file system has no locks, or the file was left by another machine, whose locks some network file systems
do not show. Readers take no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from byway.core.disk.atomic import alive
from byway.errors import ConfigError, RunError

__all__ = ["LOCK", "check_free", "locked"]

LOCK = ".run.lock"
_PATIENCE = 25
"""Attempts, 20 ms apart: a holder needs a moment to write its record."""

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""The directories that this context has locked: a command may hold the lock around a function that takes it."""


@dataclass(frozen=True)
class _Holder:
    """The process that holds a lock."""

    pid: int
    started: str
    """Start of the process in clock ticks after boot, ``""`` where the system does not tell."""
    host: str
    boot: str
    """The kernel's boot id: containers on one machine have other host names, but the same boot id."""
    since: str
    """When it took the lock."""

    @classmethod
    def me(cls) -> _Holder:
        return cls(os.getpid(), _started(os.getpid()), socket.gethostname(), _boot(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, text: str) -> _Holder | None:
        """Read a record. None if it is empty, cut short or not a record."""
        try:
            values: Any = json.loads(text)
            return cls(int(values["pid"]), *(str(values[name]) for name in ("started", "host", "boot", "since")))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    @property
    def is_elsewhere(self) -> bool:
        """True if it ran on another machine."""
        return self.host != socket.gethostname() and not (self.boot and self.boot == _boot())

    @property
    def runs(self) -> bool:
        """True if the process is still there, and not another one with the same id."""
        return alive(self.pid) and (not self.started or self.started == _started(self.pid))


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def check_free(directory: Path) -> None:
    """Look, without taking the lock, whether another process is known to write to `directory`.

    Raises:
        ConfigError: another process does, or may on another machine; the message names it.
    """
    directory = Path(os.path.realpath(directory))
    if directory in _held.get():
        return
    try:
        holder = _Holder.of((directory / LOCK).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return  # there is no lock, or it will be refused when it is taken
    if holder is not None and (holder.is_elsewhere or holder.runs):
        raise _refusal(directory, holder)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within this context no other process writes to `directory`, which is created if missing.

    Raises:
        ConfigError: another process holds the lock; the message names it.
        RunError: the directory cannot be written to.
    """
    path = Path(os.path.realpath(directory))
    if path in _held.get():
        yield
        return
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path)
    except OSError as error:
        raise RunError(f"cannot lock {directory}: {error.strerror} ({error.filename})") from error
    token = _held.set(_held.get() | {path})
    try:
        yield
    finally:
        _held.reset(token)
        with suppress(OSError):
            (path / LOCK).unlink(missing_ok=True)  # before the lock is released, or it might be another's
        os.close(descriptor)
        if made:
            with suppress(OSError):
                path.rmdir()  # only if nothing was written


def _taken(directory: Path) -> int:
    """Take the lock and write the record; return the descriptor that holds it."""
    path, holder = directory / LOCK, None
    for _ in range(_PATIENCE):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with ExitStack() as unless_taken:
            unless_taken.callback(os.close, descriptor)
            got = _flock(descriptor)
            holder = _Holder.of(os.pread(descriptor, 4096, 0).decode("utf-8", "replace"))
            if got is not False and _is_at(descriptor, path):  # else its last holder has just removed it
                if holder is not None and (holder.is_elsewhere or (got is None and holder.runs)):
                    break
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(_Holder.me())).encode(), 0)
                unless_taken.pop_all()
                return descriptor
        if holder is not None and holder.runs:
            break
        time.sleep(0.02)
    raise _refusal(directory, holder)


def _flock(descriptor: int) -> bool | None:
    """Take the lock and return True. False: another process holds it; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """True if the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _refusal(directory: Path, holder: _Holder | None) -> ConfigError:
    if holder is None:
        return ConfigError(f"{directory} is in use by another process", "wait until it ends, or choose another output")
    who = f"process {holder.pid} on {holder.host}, since {holder.since}"
    if holder.is_elsewhere:
        hint = f"if that process no longer runs, remove {directory / LOCK}; otherwise choose another output"
        return ConfigError(f"{directory} is in use by {who}", hint)
    return ConfigError(f"{directory} is in use by {who}", "wait until it ends, or choose another output")
