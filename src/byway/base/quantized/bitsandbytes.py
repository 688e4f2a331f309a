"""Quantize a base while loading, with bitsandbytes, and work around three problems of its CPU kernels.

NF4 with double quantization as in QLoRA (arXiv 2305.14314, §3), int8 as in LLM.int8() (arXiv 2208.07339). Output heads
keep their dtype.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base.architecture import HEAD_NAMES
from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["QUANTIZERS", "check_quantizer", "check_weights", "quantization_config", "repair"]

QUANTIZERS = ("int8", "nf4")


def check_quantizer() -> None:
    """Raise ConfigError unless bitsandbytes is installed, and accelerate, through which transformers uses it."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"quantize needs {package}, which is not installed", "pip install 'byway[quant]'")


def quantization_config(kind: str, dtype: torch.dtype, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> Any:
    """Return transformers' configuration for ``"int8"`` or ``"nf4"``; `dtype`: of the products.

    Not quantized are the output embedding and the modules in :data:`HEAD_NAMES`.
    """
    import torch
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    output = model.get_output_embeddings()
    skip = [path for path, module in model.named_modules() if module is output or path.rpartition(".")[2] in HEAD_NAMES]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def check_weights(model: nn.Module, config: Path) -> None:
    """Refuse linear maps that the file `config` says are stored in 8 or 4 bits, and whose weights are not."""
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    def stored(module: Linear4bit | Linear8bitLt) -> bool:
        weight = module.weight
        if isinstance(module, Linear4bit):
            return isinstance(weight, Params4bit) and weight.quant_state is not None
        return isinstance(weight, Int8Params) and not weight.dtype.is_floating_point

    maps = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    if plain := [path for path, module in maps.items() if not stored(module)]:
        bits = "4" if isinstance(maps[plain[0]], Linear4bit) else "8"
        raise ConfigError(
            f"{config} says that {len(maps)} linear maps are stored in {bits} bits (bitsandbytes), but {len(plain)} are not: "
            f"{listed(plain, 3)}",
            "if its weights are plain numbers, remove quantization_config from it; base.quantize quantizes them while loading",
        )


def repair(model: nn.Module) -> None:
    """Keep 4-bit linear maps from being re-packed for AVX512-BF16, and 8-bit ones from logging a line per call.

    Without re-packing, evaluation on such CPUs is 2-3 times slower, but right. 4-bit weights of any width are
    dequantized correctly afterwards, also on CPUs where bitsandbytes alone does not.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    from byway.core.weights import disable_repacking

    disable_repacking(model)
    if any(isinstance(module, Linear4bit) for module in model.modules()) and not _dequantizes_short_rows():
        _dequantize_as_one_row()
    if any(isinstance(module, Linear8bitLt) for module in model.modules()):
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        if _about_casts not in logger.filters:
            logger.addFilter(_about_casts)


def _about_casts(record: logging.LogRecord) -> bool:
    """False for the line that bitsandbytes logs per layer and step about casting inputs to float16, else True."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _dequantizes_short_rows() -> bool:
    """True if bitsandbytes dequantizes rows correctly that are shorter than a block of 64 weights."""
    import torch

    codes, scales = torch.zeros(128, 1, dtype=torch.uint8), torch.arange(1.0, 65.0)  # code 0 is -1; blocks of 64 weights
    found = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, 64, "nf4", [8, 32], torch.float32)
    return torch.equal(found.flatten(), -scales[:4].repeat_interleave(64))


@cache
def _dequantize_as_one_row() -> torch.library.Library:
    """Replace bitsandbytes' CPU kernel by one that passes each 4-bit weight to it as a single row.

    On CPUs with AVX512 the kernel of bitsandbytes 0.50.2 starts a new block at each row. If the row length is a
    multiple of 16 but not of the block size, the weights are wrong, and it reads beyond the scales. A single row is
    dequantized correctly. The result keeps the replacement registered.
    """
    import torch

    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def dequantize(
        keys: Any, codes: torch.Tensor, scales: torch.Tensor, blocksize: int, kind: str, shape: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        return kernel.call_boxed(keys, codes, scales, blocksize, kind, [math.prod(shape)], dtype).reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # torch warns about every kernel that is replaced
        library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    return library
