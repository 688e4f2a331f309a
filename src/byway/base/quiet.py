"""Messages while loading: Byway's own as single lines on stderr; those of transformers are switched off meanwhile."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

__all__ = ["quiet", "say"]


def say(line: str) -> None:
    """Print one line to stderr; stdout is for data."""
    print(f"byway: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(stderr: bool = False) -> Iterator[None]:
    """Suppress progress bars and log lines below ERROR of transformers; restore its settings afterwards.

    `stderr`: also drop what is written there (transformers' GGUF reader draws a bar that no setting turns off).
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars_off = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sink = contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext()
    try:
        with sink:
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars_off:
            disable_progress_bars()
        else:
            enable_progress_bars()
