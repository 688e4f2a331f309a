"""Which model class goes with which task, and the functions that make one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from byway.compat.peft.config import PeftConfig
from byway.compat.peft.files import base_name
from byway.compat.peft.model import PeftModel
from byway.compat.peft.session import Session, session_of
from byway.compat.peft.types import TaskType
from byway.errors import AdapterError

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
    "inject_adapter_in_model",
    "model_class",
]


class PeftModelForCausalLM(PeftModel):
    """A causal language model; the arguments are spelled out so that trainers see which columns it takes."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        return _call(super().forward, locals(), kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        return _call(super().forward, locals(), kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of whole sequences; its head is trained too."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        return _call(super().forward, locals(), kwargs)


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A classifier of tokens; its head is trained too."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer; its head is trained too."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        **kwargs: Any,
    ) -> Any:
        return _call(super().forward, locals(), kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives hidden states."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return _call(super().forward, locals(), kwargs)


def _call(forward: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Pass on what was given; an argument left at None is the model's own default."""
    own = {k: v for k, v in given.items() if k not in ("self", "kwargs", "__class__") and v is not None}
    return forward(**own, **kwargs)


_CLASSES: Mapping[TaskType, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class(config: PeftConfig) -> type[PeftModel]:
    """The class for the configuration's task."""
    return PeftModel if config.task_type is None else _CLASSES[TaskType(str(config.task_type))]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Attach what `peft_config` describes to `model`, which stays the object it is, and return peft's model around it.

    mixed, low_cpu_mem_usage: accepted; methods can be mixed anyway, and nothing is allocated twice.

    Raises:
        AdapterError: Byway has no such method or option, or a target is not there; the model is unchanged.
    """
    recorded = base_name(model)
    if recorded is not None:
        peft_config.base_model_name_or_path = recorded
    if revision is not None:
        peft_config.revision = revision
    return model_class(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False, **options: Any
) -> nn.Module:
    """Attach what `peft_config` describes and return the very same model."""
    refused = sorted(k for k, v in options.items() if v is not None)
    if refused:
        raise AdapterError(f"inject_adapter_in_model: {', '.join(refused)} is not supported here")
    if peft_config.is_prompt_learning:
        raise AdapterError("`create_and_replace` does not support prompt learning yet.")
    session = session_of(model) or Session(model)
    session.add(peft_config, adapter_name)
    vars(model)["peft_config"] = session.configs
    return model


class AutoPeftModel:
    """Loads an adapter and the base that its configuration names."""

    task: ClassVar[TaskType | None] = None
    loader: ClassVar[str | None] = None

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
        """The base (loaded by transformers with `kwargs`) with the adapter beside it.

        Raises:
            AdapterError: the configuration names no base, or another task than this class's.
        """
        import transformers

        own = PeftConfig.from_pretrained(pretrained_model_name_or_path) if config is None else config
        if own.base_model_name_or_path is None:
            raise AdapterError(
                f"{pretrained_model_name_or_path}: its configuration names no base model", "load it yourself: PeftModel.from_pretrained"
            )
        task = cls.task if cls.task is not None else (None if own.task_type is None else TaskType(str(own.task_type)))
        if cls.task is not None and own.task_type is not None and own.task_type != cls.task:
            raise AdapterError(f"Expected target PEFT class for {cls.task}, but the adapter was made for {own.task_type}")
        if task is None:
            raise AdapterError(
                "Cannot infer the auto class from the config: it has no task_type", "use AutoPeftModelForCausalLM or its like"
            )
        loader = vars(transformers)[_AUTO[task]] if _AUTO[task] in vars(transformers) else getattr(transformers, _AUTO[task])
        base = loader.from_pretrained(own.base_model_name_or_path, revision=revision or own.revision, **kwargs)
        return _CLASSES[task].from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config)


_AUTO: Mapping[TaskType, str] = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with an adapter."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder with an adapter."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier of sequences with an adapter."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A classifier of tokens with an adapter."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """A question answerer with an adapter."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model that gives hidden states, with an adapter."""

    task = TaskType.FEATURE_EXTRACTION
