"""Adapters as directories of HF peft 0.21, for exchange in both directions (vLLM loads them too).

A directory holds ``adapter_config.json``, ``adapter_model.safetensors`` and a short ``README.md``. A tensor is called
``base_model.model.<module path>.<name>``, without the adapter's name; a tensor of the whole model (a prompt) has no
prefix. The configuration has only fields that peft knows; what Byway adds (a fingerprint of the base, a hash) is in
the tensors' metadata.

Loading is strict: everything is checked before the model is touched, and in a file the tensors decide. Configuration
entries that match nothing and have no tensor are noted. Not part of the adapter itself, but written by peft and
understood here:

* the weight of an embedding or a head whose vocabulary was resized: ignored if it equals the base's, else installed as
  a frozen replacement (``vocabulary.py``),
* ``<path>.original_module.*`` next to a module trained whole (ignored), and ``<path>.modules_to_save.*``, its second
  copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from byway.core.method import Attached, Method
from byway.formats.format import Format, Loaded, LoadOptions
from byway.formats.peft.config import CONFIG, WEIGHTS, checked_config
from byway.formats.peft.load import described, load_adapter
from byway.formats.peft.save import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Peft"]


class Peft(Format):
    """``adapter_config.json`` and ``adapter_model.safetensors``, for the methods that have a ``PeftFormat``."""

    order = 20
    files = (CONFIG, WEIGHTS)
    label = "peft"

    def read_config(self, directory: Path) -> dict[str, Any]:
        return checked_config(directory)

    def declines(self, adapter: Attached) -> str:
        peft = adapter.method.peft
        if peft is None:
            return f"HF peft has no name for {type(adapter.method).__name__}"
        return peft.declines(adapter.method, adapter.model, adapter.side_paths())

    def describe(self, directory: Path, options: LoadOptions) -> Method:
        return described(directory, options)

    def load(self, model: nn.Module, directory: Path, options: LoadOptions) -> Loaded:
        return load_adapter(model, directory, options)

    def save(self, adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        save_adapter(adapter, directory, tokenizer)
