"""peft's enumerations; each member is also the string it stands for."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

__all__ = ["PeftType", "PromptEncoderReparameterizationType", "PromptTuningInit", "TaskType", "text"]


class PeftType(StrEnum):
    """The methods of peft that Byway has."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


class TaskType(StrEnum):
    """What the model is trained for; decides the model class and which heads are trained."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptTuningInit(StrEnum):
    """How a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(StrEnum):
    """What produces the virtual tokens of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


def text(value: Any) -> Any:
    """An enumeration's string, in any nesting of lists and dicts; everything else as it is (sets become sorted lists)."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, dict):
        return {text(k): text(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(text(v) for v in value)
    if isinstance(value, list | tuple):
        return [text(v) for v in value]
    return value
