"""HF peft's interface over Byway: ``from byway.compat.peft import LoraConfig, get_peft_model`` instead of ``from peft import …``.

A thin layer: configurations become the core's methods, the side paths that the core hangs get peft's names on top, and where peft's
interface promises something that the core does not do (merging that can be taken back, one active adapter that alone is trained) it is kept
here. What Byway does not have is refused by name. ``docs/compat.md`` lists what differs.
"""

from __future__ import annotations

from typing import Any

from byway.compat.peft.config import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_config,
)
from byway.compat.peft.files import get_peft_model_state_dict, set_peft_model_state_dict
from byway.compat.peft.mapping import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from byway.compat.peft.model import PeftModel
from byway.compat.peft.training import (
    create_loraplus_optimizer,
    get_base_model_state_dict,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from byway.compat.peft.types import PeftType, PromptEncoderReparameterizationType, PromptTuningInit, TaskType
from byway.errors import AdapterError

__all__ = [
    "AdaLoraConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "create_loraplus_optimizer",
    "get_base_model_state_dict",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and name.endswith(("Config", "Model")):
        raise AdapterError(f"byway.compat.peft has no {name}: Byway does not have this method", "use HF peft for it")
    raise AttributeError(f"byway.compat.peft has no {name!r}")
