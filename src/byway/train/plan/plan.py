"""What a run will do, as numbers, before it does it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Plan"]


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
    """An estimate of the process's peak, or the GPU's: weights, gradients, optimizer, and the activations of the largest micro-batch."""
    memory_note: str = ""
    """That this is more than there is, where it is."""
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
        epochs = f"{self.steps / self.steps_per_epoch:.3g}"
        steps = f"{self.steps:,} steps ({epochs} {'epoch' if epochs == '1' else 'epochs'}, {self.warmup} warm-up)"
        return {
            "base": self.base,
            "trained": f"{self.trained:,} numbers ({self.share:.3%})",
            "data": epoch + (f", {self.eval_rows:,} rows to evaluate" if self.eval_rows else ""),
            "steps": steps,
            "engine": self.levers,
            "memory": f"about {self.memory_mb:,} MB (an estimate)" + (f": {self.memory_note}, it may not fit" if self.memory_note else ""),
            "output": self.output,
        }
