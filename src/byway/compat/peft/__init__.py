"""HF peft's interface over Byway: replace ``from peft import …`` by ``from byway.compat.peft import …``.

Configurations become the core's methods, and the side paths that the core attaches get peft's names on top. What peft
promises and the core does not have is added here: merges that can be undone, and switching that freezes inactive
adapters. Methods and options that Byway does not have are refused by name. ``docs/compat.md`` lists the differences.
"""

from __future__ import annotations

from typing import Any

from byway.compat.peft.config import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)
from byway.compat.peft.files import (
    create_loraplus_optimizer,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
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
from byway.errors import nearest

__all__ = [
    "AdaLoraConfig", "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification", "IA3Config", "LNTuningConfig", "LoraConfig", "PeftConfig", "PeftModel",
    "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "PrefixTuningConfig",
    "PromptEncoderConfig", "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig",
    "PromptTuningInit", "TaskType", "create_loraplus_optimizer", "get_base_model_state_dict", "get_peft_config",
    "get_peft_model", "get_peft_model_state_dict", "inject_adapter_in_model", "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training", "set_base_model_state_dict", "set_peft_model_state_dict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    raise AttributeError(f"byway.compat.peft has no {name}: {nearest(name, __all__)} Use HF peft for what Byway does not have.", name=name)
