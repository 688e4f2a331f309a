"""The plan of a run in numbers, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from byway.errors import counted

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one run."""

    trained: int
    """Trainable parameters of all adapters."""
    frozen: int
    rows: int
    """Training examples."""
    tokens: int
    """Tokens of the training examples."""
    labels: int
    """Tokens in the loss; for classification, one per row."""
    eval_rows: int
    steps: int
    steps_per_epoch: int
    micro_tokens: int
    warmup: int
    levers: str
    """Every optimization, on or off, with the reason."""
    engine: str = ""
    """Those that are on."""
    memory_mb: int
    """Estimated peak of process or GPU: weights, gradients, optimizer, and the largest micro-batch's activations."""
    memory_note: str = ""
    """A warning if that is more than is available."""
    base: str
    output: str
    criterion: str
    details: tuple[str, ...] = ()
    """What happened to the rows, and other remarks, a line each."""
    summary: str = ""
    """Which modules are adapted."""

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, in [0, 1]."""
        return self.trained / max(self.trained + self.frozen, 1)

    def parts(self) -> dict[str, str]:
        """Return the plan as (name, a few words), in order."""
        tokens, labels = counted(self.tokens, "token"), counted(self.labels, "label")
        epoch = f"{counted(self.rows, 'row')}, {tokens} per epoch ({labels} in the loss)"
        epochs = f"{self.steps / self.steps_per_epoch:.3g}"
        steps = f"{counted(self.steps, 'step')} ({epochs} {'epoch' if epochs == '1' else 'epochs'}, {self.warmup} warm-up)"
        return {
            "base": self.base,
            "trained": f"{self.trained:,} trainable parameters ({self.share:.2%})",
            "data": epoch + (f", {counted(self.eval_rows, 'row')} to evaluate" if self.eval_rows else ""),
            "steps": steps,
            "engine": self.engine or "no optimizations",
            "memory": f"about {self.memory_mb:,} MB (an estimate)" + (f": {self.memory_note}, it may not fit" if self.memory_note else ""),
            "output": self.output,
        }
