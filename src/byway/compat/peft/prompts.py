"""How a prompt of peft's configuration is trained; its files hold only the folded vectors, which is what the core's method reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from byway.compat.peft.config import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from byway.compat.peft.types import PromptTuningInit
from byway.core.method import Method
from byway.errors import AdapterError

__all__ = ["as_trained"]


def as_trained(method: Method, config: PeftConfig, model: nn.Module) -> Method:
    """The method with the start and the encoder that `config` asks for."""
    if isinstance(config, PromptTuningConfig):
        return replace(method, **_prompt_start(config))
    if isinstance(config, PromptEncoderConfig):
        kind = str(config.encoder_reparameterization_type).lower()
        options: dict[str, Any] = {"encoder": kind, "hidden_size": config.encoder_hidden_size, "dropout": config.encoder_dropout}
        return replace(method, **options, **({"lstm_layers": config.encoder_num_layers} if kind == "lstm" else {}))
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
        return replace(method, **{"hidden_size": config.encoder_hidden_size or _width(model)})
    return method


def _prompt_start(config: PromptTuningConfig) -> dict[str, Any]:
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        return {"init": "text", "text": config.prompt_tuning_init_text}
    return {"init": "vocabulary" if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB else "random"}


def _width(model: nn.Module) -> int:
    config: Any = vars(model).get("config")
    if config is None:
        raise AdapterError("prefix_projection: the model has no configuration to read its width from", "give encoder_hidden_size")
    return config.get_text_config().hidden_size
