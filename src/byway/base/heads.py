"""The output heads that a base can be loaded with. A further kind of head is one more row of :data:`HEADS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["HEADS", "Head", "of_peft_type"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """One kind of output head."""

    name: str
    """The value of ``load_base``'s `task`."""
    words: str
    """Its name in messages, with its article."""
    mapping: str
    """The mapping from configuration to model class in ``transformers.models.auto.modeling_auto``."""
    endings: tuple[str, ...]
    """The endings of the names of its model classes."""
    peft_type: str
    """HF peft's task type."""
    modules: tuple[str, ...] = ()
    """The modules of the head that HF peft expects in an adapter's file, as far as the model has them."""
    decoder: bool = False
    """True if only a decoder can have it; an encoder that transformers lists under `mapping` too is refused."""
    fresh: bool = False
    """True if a base without such a head gets a new one, drawn from torch's seed and trained with the adapter."""
    labels: bool = False
    """True if its size is a number of classes, so that loading needs `num_labels` or `label_names`."""


_ROWS = (
    Head(
        name="causal_lm",
        words="a causal language model",
        mapping="MODEL_FOR_CAUSAL_LM_MAPPING",
        endings=("ForCausalLM", "LMHeadModel"),
        peft_type="CAUSAL_LM",
        decoder=True,
    ),
    Head(
        name="classification",
        words="a sequence classifier",
        mapping="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        endings=("ForSequenceClassification",),
        peft_type="SEQ_CLS",
        modules=("classifier", "score"),
        fresh=True,
        labels=True,
    ),
)

HEADS: Mapping[str, Head] = MappingProxyType({head.name: head for head in _ROWS})
"""``load_base``'s `task` -> the head."""


def of_peft_type(task_type: str | None) -> Head | None:
    """Return the head that HF peft calls by this task type; None if there is none here."""
    return next((head for head in _ROWS if head.peft_type == task_type), None)
