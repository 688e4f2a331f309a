"""What a run will do, as numbers, before it does it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

__all__ = ["Plan", "available_bytes", "peak_mb", "static_bytes"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one run."""

    trained: int
    """Numbers that are trained, over all adapters."""
    frozen: int
    rows: int
    """Training examples."""
    tokens: int
    """Their tokens."""
    labels: int
    """How many of these are in the loss; of a classification, one a row."""
    eval_rows: int
    steps: int
    steps_per_epoch: int
    micro_tokens: int
    warmup: int
    levers: str
    memory_mb: int
    """An estimate: the process with its weights, gradients, optimizer, and the activations of the largest micro-batch."""
    base: str
    output: str
    criterion: str
    details: tuple[str, ...] = ()
    """What became of the rows, and other remarks, a line each."""
    summary: str = ""
    """Which modules are adapted."""

    @property
    def share(self) -> float:
        """Trained numbers over all numbers, in [0, 1]."""
        return self.trained / max(self.trained + self.frozen, 1)

    def parts(self) -> dict[str, str]:
        """The plan in a few words each, in order."""
        epoch = f"{self.rows:,} rows, {self.tokens:,} tokens ({self.labels:,} labels) an epoch"
        steps = f"{self.steps:,} steps ({self.steps / self.steps_per_epoch:.3g} epochs, {self.warmup} warm-up)"
        return {
            "base": self.base,
            "trained": f"{self.trained:,} numbers ({self.share:.3%})",
            "data": epoch + (f", {self.eval_rows:,} rows to evaluate" if self.eval_rows else ""),
            "steps": steps,
            "engine": self.levers,
            "memory": f"about {self.memory_mb:,} MB (an estimate)",
            "output": self.output,
        }


def static_bytes(model: nn.Module, device: torch.device) -> int:
    """What a run holds besides activations: the weights (on a CPU the whole process as it is now), gradients, AdamW's two moments."""
    status = Path("/proc/self/statm")
    if device.type == "cpu" and status.is_file():
        held = int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:
        weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
        held = sum(weights.values())
    return held + sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device` (CPU: what the system says), or None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    found = [line.split() for line in info.read_text(encoding="ascii").splitlines()]
    return next((int(words[1]) * 1024 for words in found if words[0] == "MemAvailable:"), None)


def peak_mb(device: torch.device) -> int:
    """The most memory this process has used so far: on a GPU what torch has allocated there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if os.name != "posix":
        return 0
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, others kilobytes
