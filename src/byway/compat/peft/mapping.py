"""The model classes by task, and the functions that make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from byway.base.load import base_directory
from byway.base.source import BUILT_IN, locate
from byway.compat.peft.config import MODEL_CLASSES, PeftConfig, TaskType, own_config
from byway.compat.peft.model import PeftModel
from byway.compat.peft.session import Session, session_of
from byway.errors import AdapterError
from byway.formats.record import base_name

__all__ = [
    "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "get_peft_model", "inject_adapter_in_model",
]  # fmt: skip


class PeftModelForCausalLM(
    PeftModel, task=TaskType.CAUSAL_LM, auto_class="AutoModelForCausalLM", forward="input_ids attention_mask inputs_embeds labels"
):
    """A causal language model."""


class PeftModelForSeq2SeqLM(
    PeftModel,
    task=TaskType.SEQ_2_SEQ_LM,
    auto_class="AutoModelForSeq2SeqLM",
    forward="input_ids attention_mask inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels",
):
    """An encoder-decoder."""


class PeftModelForSequenceClassification(
    PeftModel,
    task=TaskType.SEQ_CLS,
    auto_class="AutoModelForSequenceClassification",
    forward="input_ids attention_mask token_type_ids position_ids inputs_embeds labels",
):
    """A sequence classifier; its head is trained too."""


class PeftModelForTokenClassification(
    PeftModelForSequenceClassification, task=TaskType.TOKEN_CLS, auto_class="AutoModelForTokenClassification"
):
    """A token classifier; its head is trained too."""


class PeftModelForQuestionAnswering(
    PeftModel,
    task=TaskType.QUESTION_ANS,
    auto_class="AutoModelForQuestionAnswering",
    forward="input_ids attention_mask token_type_ids position_ids inputs_embeds start_positions end_positions",
):
    """A model for extractive question answering; its head is trained too."""


class PeftModelForFeatureExtraction(
    PeftModel, task=TaskType.FEATURE_EXTRACTION, auto_class="AutoModel", forward="input_ids attention_mask inputs_embeds"
):
    """A model that returns hidden states."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Attach the adapter that `peft_config` describes to `model`, and return peft's model around it.

    `mixed` and `low_cpu_mem_usage` are accepted and have no effect: methods can always be mixed, and nothing is
    allocated twice.

    Raises:
        AdapterError: Byway does not have the method or an option, or a target does not exist; the model is unchanged.
    """
    peft_config = own_config(peft_config)
    peft_config.base_model_name_or_path = base_name(model) or peft_config.base_model_name_or_path
    peft_config.revision = revision or peft_config.revision
    return PeftModel.class_for(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False, **options: Any
) -> nn.Module:
    """Attach the adapter that `peft_config` describes to `model`, and return `model`."""
    refused = sorted(name for name, value in options.items() if value is not None)
    if refused:
        raise AdapterError(f"inject_adapter_in_model: {', '.join(refused)} is not supported")
    peft_config = own_config(peft_config)
    if peft_config.is_prompt_learning:
        raise AdapterError("inject_adapter_in_model does not support prompts", "use get_peft_model")
    session = session_of(model) or Session(model)
    session.attach_config(peft_config, adapter_name)
    vars(model)["peft_config"] = session.peft_config
    return model


class AutoPeftModel:
    """Load an adapter and the base that its configuration names."""

    task: ClassVar[TaskType | None] = None

    def __init_subclass__(cls, task: TaskType) -> None:
        cls.task = task

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base with transformers, to which `kwargs` are passed, and attach the adapter.

        Raises:
            AdapterError: the configuration names no base or no task, or another task than this class's.
        """
        import transformers

        own: PeftConfig = PeftConfig.from_pretrained(pretrained_model_name_or_path) if config is None else config
        if own.base_model_name_or_path is None:
            raise AdapterError(
                f"the configuration of {pretrained_model_name_or_path} names no base model",
                "load the base yourself, and pass it to PeftModel.from_pretrained",
            )
        if cls.task is not None and own.task_type not in (None, cls.task):
            raise AdapterError(f"Expected target PEFT class for {cls.task}, but the adapter was made for {own.task_type}")
        task = cls.task or own.task_type
        if task is None:
            raise AdapterError("the configuration has no task_type", "use AutoPeftModelForCausalLM, or another class for one task")
        chosen = MODEL_CLASSES[TaskType(task)]
        loader: Any = getattr(transformers, chosen.auto_class)
        name = own.base_model_name_or_path
        found = base_directory(locate(name)) if name == BUILT_IN else name
        base = loader.from_pretrained(found, revision=revision or own.revision, **kwargs)
        base.name_or_path = base.config.name_or_path = name  # not the path of a cache
        return chosen.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config)


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM):
    """Load a causal language model with an adapter."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Load an encoder-decoder with an adapter."""


class AutoPeftModelForSequenceClassification(AutoPeftModel, task=TaskType.SEQ_CLS):
    """Load a sequence classifier with an adapter."""


class AutoPeftModelForTokenClassification(AutoPeftModel, task=TaskType.TOKEN_CLS):
    """Load a token classifier with an adapter."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task=TaskType.QUESTION_ANS):
    """Load a model for question answering with an adapter."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Load a model that returns hidden states, with an adapter."""
