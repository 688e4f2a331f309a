"""Building blocks of atomic writes: temporary names, flushing to disk, replacing a directory by one rename."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["alive", "beside", "flush", "host", "install", "is_temporary", "remove", "sweep"]

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # fcntl.h


def install(temporary: Path, target: Path) -> None:
    """Move the directory `temporary` to `target`. An old `target` ends up at `temporary` or is deleted."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(temporary, target)
        return
    if _exchange(temporary, target):
        return
    aside = beside(target)
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one system call. Return False if the system or the file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _prefix(target: Path) -> str:
    return f".{target.name}.byway-"


def beside(target: Path) -> Path:
    """Return a new temporary path in the directory of `target`: ``.NAME.byway-HOST-PID-RANDOM``.

    :func:`sweep` uses host and process id to tell whether the writer is still running.
    """
    return target.with_name(f"{_prefix(target)}{host()}-{os.getpid()}-{os.urandom(4).hex()}")


def is_temporary(entry: Path) -> bool:
    """True if an entry has a name that :func:`beside` gives."""
    return entry.name.startswith(".") and ".byway-" in entry.name


def host() -> str:
    """Return this machine's id in temporary names and cache markers: 8 hex digits of the hashed host name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sweep(target: Path) -> None:
    """Delete temporary files next to `target` whose writer ran on this machine and is no longer running."""
    prefix = _prefix(target)
    for entry in target.parent.iterdir():
        home, _, rest = entry.name.removeprefix(prefix).partition("-")
        process = rest.partition("-")[0]
        if not entry.name.startswith(prefix) or home != host() or not process.isdigit() or alive(int(process)):
            continue
        with suppress(OSError):
            remove(entry)


def remove(entry: Path) -> None:
    """Delete a file, a link or a whole directory; nothing if it is not there."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """True if a process with this id is running on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # owned by another user
    return True


def flush(path: Path) -> None:
    """Call fsync on a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync for directories
            raise
    finally:
        os.close(descriptor)
