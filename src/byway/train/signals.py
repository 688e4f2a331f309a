"""SIGINT and SIGTERM: finish the step, save a checkpoint, exit. A second signal exits at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "Stopped", "listening"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal. ``checkpoint``: where it can be resumed, or None if it exited at once."""

    def __init__(self, number: int, checkpoint: Path | None = None) -> None:
        super().__init__(number, checkpoint)
        self.number = number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"Stopped by {name}"
        return f"Stopped by {name} at step {self.checkpoint.name.removeprefix('step-')}. Checkpoint saved: {self.checkpoint}"

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopRequest:
    """The signal that asked the run to stop, if any."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within this context the first signal is recorded and the second raises :class:`Stopped` at once.

    Only the main thread may handle signals; in other threads nothing is installed. Previous handlers are restored. The
    handler prints nothing, since it may interrupt a print.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request:
            raise Stopped(number)
        request.number = number

    before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
