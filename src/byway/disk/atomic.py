"""The steps by which something new takes the place of something old on a disk: temporary names, flushing, one rename."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
from pathlib import Path

__all__ = ["alive", "beside", "flush", "host", "install", "sweep"]

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # fcntl.h


def install(temporary: Path, target: Path) -> None:
    """Put the directory `temporary` in the place of `target`; what was there ends up in `temporary` or is gone."""
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
    """Swap two directories in one system call; False where the system or the file system has none."""
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
    """A fresh name beside `target`: ``.NAME.byway-HOST-PID-RANDOM``; host and process tell :func:`sweep` whether its writer lives."""
    return target.with_name(f"{_prefix(target)}{host()}-{os.getpid()}-{os.urandom(4).hex()}")


def host() -> str:
    """This machine, as temporary names and marks call it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sweep(target: Path) -> None:
    """Remove what writers of this machine that no longer run have left beside `target`."""
    prefix = _prefix(target)
    for entry in target.parent.iterdir():
        home, _, rest = entry.name.removeprefix(prefix).partition("-")
        process = rest.partition("-")[0]
        if not entry.name.startswith(prefix) or home != host() or not process.isdigit() or alive(int(process)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs, under another user
    return True


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync for directories
            raise
    finally:
        os.close(descriptor)
