"""Memory of the machine: how much is available, and how much this process uses."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

__all__ = ["available_bytes", "held_bytes", "high_water_bytes", "peak_mb", "trim"]


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes in use now: by the whole process on a CPU, by the model on a GPU."""
    status = Path("/proc/self/statm")
    if device.type == "cpu" and status.is_file():
        return int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(weights.values())


def high_water_bytes(device: torch.device) -> int:
    """Return the peak so far on the CPU (loading a model may take more than training it); 0 on a GPU."""
    return 0 if device.type == "cuda" else peak_mb(device) << 20


def trim() -> None:
    """Return freed memory to the system if the C library can (glibc), so that resident memory is memory in use."""
    gc.collect()
    if sys.platform == "linux":
        import ctypes

        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device) -> int | None:
    """Return the memory available on `device` (CPU: the system's, within the control group's), or None if unknown."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = Path("/proc/meminfo")
    lines = [line.split() for line in info.read_text(encoding="ascii").splitlines()] if info.is_file() else []
    system = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
    return min((own for own in (system, group_bytes()) if own is not None), default=None)


def group_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return what this process's control groups (version 1 or 2: a container's limit) still allow, the least over all
    levels; None without a limit."""
    if not own.is_file():
        return None
    rooms: list[int] = []
    for line in own.read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        top = root / "memory" if controllers else root
        here = top / path.lstrip("/")
        for level in (here, *here.parents):
            rooms += _room(level, *names)
            if level == top:
                break
    return min(rooms, default=None)


def _room(level: Path, limit: str, usage: str) -> list[int]:
    """Return what one group has left: its limit minus what is in use and cannot be dropped; nothing without a limit."""
    if not (level / limit).is_file() or not (level / usage).is_file():
        return []
    allowed = (level / limit).read_text(encoding="ascii").strip()
    if allowed == "max" or int(allowed) >= 1 << 60:  # version 1 writes "no limit" as the largest number of pages
        return []
    used = int((level / usage).read_text(encoding="ascii"))
    statistics = level / "memory.stat"
    lines = statistics.read_text(encoding="ascii").splitlines() if statistics.is_file() else []
    counts = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    droppable = counts.get("total_inactive_file", counts.get("inactive_file", 0))
    return [max(int(allowed) - used + droppable, 0)]


def peak_mb(device: torch.device) -> int:
    """Return the peak memory of this process so far: torch's allocations on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, others kilobytes
