"""Quantize while loading, with bitsandbytes; and the two repairs that its CPU kernels need.

NF4 with double quantization as in QLoRA (arXiv 2305.14314, §3), int8 as in LLM.int8() (arXiv 2208.07339). Output heads keep their dtype.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from byway.base.architecture import HEAD_NAMES
from byway.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["QUANTIZERS", "check_quantizer", "quantization_config", "repair"]

QUANTIZERS = ("int8", "nf4")


def check_quantizer() -> None:
    """ConfigError unless bitsandbytes, and accelerate, through which transformers uses it, are installed."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"quantize needs {package}, which is not installed", "pip install 'byway[quant]'")


def quantization_config(kind: str, dtype: torch.dtype, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> Any:
    """transformers' configuration for ``"int8"`` or ``"nf4"``; ``dtype``: what dequantized products are computed in."""
    from transformers import BitsAndBytesConfig

    skip = _heads(config, cls)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _heads(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> list[str]:
    """Module paths that stay as they are: the output embedding, and what :data:`HEAD_NAMES` lists."""
    import torch

    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    output = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if module is output or path.rpartition(".")[2] in HEAD_NAMES]


def repair(model: nn.Module) -> None:
    """On every 4-bit linear: never re-pack for AVX512-BF16; for 8-bit ones: no log line per call.

    Without the re-packing, evaluation on such CPUs is 2-3 times slower, and right.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    from byway.core.weights import settle

    settle(model)
    if any(isinstance(module, Linear8bitLt) for module in model.modules()):
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        if _about_casts not in logger.filters:
            logger.addFilter(_about_casts)


def _about_casts(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' line per layer and step about casting inputs to float16; every other line passes."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")
