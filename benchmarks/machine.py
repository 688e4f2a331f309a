"""What the numbers depend on: the machine, the versions, memory and load. Read from /proc; no heavy imports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["available_mb", "busy_seconds", "machine", "memory_mb", "slow_bf16", "versions"]

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
"""The instructions that decide how fast matrices are multiplied."""


def machine() -> dict[str, Any]:
    """Processor, cores, instructions, memory, system; without the machine's name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = text.splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), [])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": [flag for flag in FLAGS if flag in found],
        "memory_mb": round(_field(Path("/proc/meminfo"), "MemTotal")),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def slow_bf16() -> str:
    """A warning where this CPU has no bf16 instructions, else ``""``."""
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(machine()["instructions"]):
        return ""
    return (
        "This CPU has neither avx512_bf16 nor amx: bf16 is emulated, many times slower than fp32. "
        "bf16 times here say little about other machines; bf16 memory does."
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed versions of these packages."""
    return {name: importlib.metadata.version(name) for name in packages}


def memory_mb(field: str) -> float:
    """A field of this process's status (VmRSS, VmHWM) in MB."""
    return _field(Path("/proc/self/status"), field)


def available_mb() -> float:
    """Memory that can still be had."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(path: Path, name: str) -> float:
    if not path.is_file():
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in path.read_text().splitlines() if line.startswith(f"{name}:")), 0.0)


def busy_seconds() -> float:
    """CPU seconds that everything on this machine has used since it started, guests' and stolen ones included."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, path.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
