"""Save an adapter in the format that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.method import Attached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
__all__ = ["save_adapter"]


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write `adapter` into `directory` itself: in peft's format where that can hold it, else in Byway's own.

    `tokenizer`: recorded (as hashes, with its chat template) so that loading with another one is noticed.

    Raises:
        AdapterError: `directory` holds something other than an adapter, or a tensor is not finite.
        RunError: the disk refused. In both cases what was there is unchanged.
    """
    from byway.formats.adapterhub import save as adapters_library
    from byway.formats.native import save as native
    from byway.formats.peft import save as peft

    own = adapter.method.peft_type is None or adapter.method.declines_peft(adapter.model)
    write = native.save_adapter if own else peft.save_adapter
    if own and not adapters_library.declined(adapter):
        write = adapters_library.save_adapter
    return write(adapter, Path(directory), tokenizer)
