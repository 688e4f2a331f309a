"""The settings of generation: those the user asks for, and of the base's own only what its structure needs.

A base's generation settings are somebody's taste (a repetition penalty, a minimum length). They would change every
answer and every exact match without a word, so they do not act unless the user asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["StopStrings", "UntilStop", "left_aside", "only", "structure"]

_STRUCTURE = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_NO_MATTER = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash", "generation_kwargs", "use_cache")
"""Fields that do not change an answer."""


def _own(model: PreTrainedModel) -> dict[str, Any]:
    """Return the base's settings that differ from the defaults."""
    found = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    return {name: value for name, value in found.items() if name not in _NO_MATTER and value is not None}


def structure(model: PreTrainedModel) -> dict[str, Any]:
    """Return the base's settings that always apply: token ids, and the ban on padding as a word (Marian)."""
    own = _own(model)
    kept = {name: own[name] for name in _STRUCTURE if name in own}
    if own.get("bad_words_ids") == [[own.get("pad_token_id")]]:
        kept["bad_words_ids"] = own["bad_words_ids"]
    return kept


def left_aside(model: PreTrainedModel) -> str:
    """Return a sentence on the base's settings that do not apply; ``""`` if there are none."""
    kept, own = structure(model), _own(model)
    left = [f"{name} {value}" for name, value in own.items() if name not in kept and value is not False]
    if not left:
        return ""
    apply = f" (applied: {', '.join(kept)})" if kept else ""
    return f"generation settings of the base that are not applied: {', '.join(left)}{apply}"


@contextmanager
def only(model: PreTrainedModel, options: dict[str, Any]) -> Iterator[GenerationConfig]:
    """Within this context the model generates with its :func:`structure` and `options`, and nothing else."""
    from transformers import GenerationConfig

    own: Any = model.generation_config
    model.generation_config = GenerationConfig(**(structure(model) | options))
    try:
        yield model.generation_config
    finally:
        model.generation_config = own


class StopStrings:
    """A stopping criterion: a row ends when one of `stop` is in its text. `decode`: tokens → text."""

    def __init__(self, stop: Sequence[str], width: int, decode: Callable[[list[int]], str]) -> None:
        self.stop, self.width, self.decode = stop, width, decode
        self.tokens = 4 * max(map(len, stop)) + 8  # a character takes up to four tokens

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Return for each row whether it ends here."""
        tails = input_ids[:, self.width :][:, -self.tokens :].tolist()
        ends = [any(stop in text for stop in self.stop) for text in map(self.decode, tails)]
        return torch.tensor(ends, device=input_ids.device)


class UntilStop:
    """Pass a stream of text on, up to the first of `stop`; what could be the beginning of one is held back."""

    def __init__(self, on_text: Callable[[str], None], stop: Sequence[str]) -> None:
        self.on_text, self.stop = on_text, stop
        self.held, self.done = "", False

    def __call__(self, text: str, stream_end: bool = False) -> None:
        """Take the next part of the text."""
        if self.done:
            return
        whole = self.held + text
        cut = min((place for stop in self.stop if (place := whole.find(stop)) >= 0), default=None)
        if cut is not None:
            self.done = True
            ready = whole[:cut]
        else:
            sizes = range(1, 1 if stream_end else 1 + max(map(len, self.stop), default=0))
            kept = max((size for size in sizes if any(whole.endswith(stop[:size]) for stop in self.stop)), default=0)
            ready, self.held = whole[: len(whole) - kept], whole[len(whole) - kept :]
        if ready:
            self.on_text(ready)
