"""Save an adapter in the first format that can hold it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.method import Attached
from byway.formats import formats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["save_adapter"]


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write `adapter` into `directory` itself and return it: in peft's format if that can hold it, else in Byway's own.

    `tokenizer`: recorded (as hashes, with its chat template) so that loading with another one is noticed.

    Raises:
        AdapterError: `directory` holds something other than an adapter, or a tensor is not finite.
        RunError: the disk refused. In both cases what was there is unchanged.
    """
    directory = Path(directory)
    next(format for format in formats() if not format.declines(adapter)).save(adapter, directory, tokenizer)
    return directory
