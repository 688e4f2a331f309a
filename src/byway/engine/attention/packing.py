"""Packed batches: the context in which a model attends document by document.

A batch of packed documents says where each begins (``cu_seq_lens_q``) and is attended document by document
(:mod:`byway.engine.attention.packed`), so that nothing leaks and changing one document leaves all others bit-equal. Restarted positions
alone are no contract: transformers recognizes them for some models and calls, and leaks for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from byway.core.attention import PACKED_PREFIX, check, chosen, install, is_installed, register, renamed, restore
from byway.engine.attention.packed import attend_documents
from byway.engine.attention.unpack import boundaries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["packing"]

register(PACKED_PREFIX, attend_documents)


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Within this context `model` takes packed batches.

    Raises:
        AdapterError: its attention is none that we can stand over (:func:`byway.core.attention.check`).
    """
    installed = None if is_installed(model) else install(model)
    transformer: PreTrainedModel = model  # pyright: ignore[reportAssignmentType] - what `install` has made sure of
    before, plain = chosen(transformer.config), check(model)
    transformer.set_attn_implementation(renamed(plain, lambda name: PACKED_PREFIX + name))
    try:
        with boundaries(model):
            yield
    finally:
        transformer.set_attn_implementation(before)
        if installed is not None:
            restore(model, installed)
