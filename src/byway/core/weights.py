"""Access to weights in any layout: nn.Linear, GPT-2's Conv1D, convolutions, embeddings, 8-bit and 4-bit maps.

A linear map's weight is ``(out, in)`` in torch and ``(in, out)`` in transformers' Conv1D. Methods never deal with a
quantizer: they call :func:`dense` for a weight, :func:`features` for its sizes and :func:`store` to write one.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import SLOT, base_modules
from byway.errors import NotMergeable, TargetError

__all__ = [
    "NewTensor",
    "dense",
    "device_of",
    "disable_repacking",
    "factor_dtype",
    "features",
    "forget_quantization",
    "gives_a_new_tensor",
    "is_conv",
    "is_embedding",
    "is_linear",
    "is_map",
    "is_norm",
    "is_quantized",
    "is_transposed",
    "odd_output",
    "plain",
    "store",
    "widened",
]  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """True for a linear map with a 2-D weight: nn.Linear (also 8-bit and 4-bit) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """True if the weight is stored as (in, out): transformers' Conv1D, as in GPT-2."""
    # look only in imported modules: a Conv1D cannot exist unless its module was imported
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


class NewTensor:
    """Base class of this package's instance ``forward`` objects that return a new tensor referenced nowhere else."""


def gives_a_new_tensor(module: nn.Module) -> bool:
    """True if this linear map is known to return a new tensor, the result of a matrix product, referenced nowhere else.

    Only then may a side path write into it. The output of another ``forward`` may be a view of a tensor outside the
    autograd graph (bitsandbytes), the input itself, or a tensor that the module keeps.
    """
    forward = vars(module).get("forward")
    if forward is not None:
        return isinstance(forward, NewTensor)
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return False
    return type(module).forward is nn.Linear.forward or (
        is_transposed(module) and type(module).forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
    )


def odd_output(module: nn.Module) -> str:
    """Describe what an ``nn.Linear`` subclass returns instead of one (..., out) tensor; ``""`` if it does return that.

    A mixture of experts' router often subclasses ``nn.Linear`` and returns a tuple. If the subclass overrides
    ``forward``, it is called on one row of zeros, unless it requires further arguments.
    """
    own = type(module).forward
    if not isinstance(module, nn.Linear) or own is nn.Linear.forward or is_quantized(module) or "forward" in vars(module):
        return ""
    required = [p for p in inspect.signature(own).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) != 2:
        return ""
    weight = module.weight
    with torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        try:
            out = own(module, torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"does not accept a (rows, in_features) input ({type(error).__name__})"
    if not isinstance(out, Tensor):
        return f"returns a {type(out).__name__}, not one tensor"
    if out.shape != (1, module.out_features):
        return f"returns shape {tuple(out.shape)} for one row, not (1, {module.out_features})"
    return ""


def is_conv(module: nn.Module) -> bool:
    """True for a 1-, 2- or 3-dimensional convolution (not a transposed one)."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_embedding(module: nn.Module) -> bool:
    """True for an embedding."""
    return isinstance(module, nn.Embedding)


def is_map(module: nn.Module) -> bool:
    """True for a module whose tensors are a weight and perhaps a bias: a linear map, a convolution or an embedding."""
    return is_linear(module) or is_conv(module) or is_embedding(module)


def is_norm(module: nn.Module) -> bool:
    """True for a normalization with its own weight: torch's, or a model's own class (LlamaRMSNorm, T5LayerNorm)."""
    # the models' own classes have no common base class: they share the name, a weight, and having no children
    children = any(child is not None and name != SLOT for name, child in module._modules.items())
    return "Norm" in type(module).__name__ and module._parameters.get("weight") is not None and not children


def _is_4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def is_quantized(module: nn.Module) -> bool:
    """True if the weight is stored in 8 or 4 bits (bitsandbytes), so that it cannot be written without loss."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear map, (entries, width) of an embedding, or (in, out) channels of a convolution.

    Read from the module's attributes, since the shape of a 4-bit weight is that of its packed bytes.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    weight = module.weight
    if is_transposed(module) and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    raise TargetError(
        f"{type(module).__name__} has no weight to which a low-rank update applies", "target linear maps, embeddings or convolutions"
    )


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's weight, on which its side path belongs."""
    tensor = next(module.parameters(recurse=False), None)
    if tensor is None:
        tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def dense(module: nn.Module) -> Tensor:
    """Return the weight in the module's own layout; 8-bit and 4-bit weights are dequantized into a new tensor."""
    if not isinstance(module.weight, Tensor):
        raise TargetError(f"{type(module).__name__} has no weight tensor")
    weight: Any = module.weight  # bitsandbytes' parameters have further attributes
    if not is_quantized(module):
        return weight.detach()
    if not _is_4bit(module):
        state: Any = module.state  # bitsandbytes moves codes and scales here at the first forward
        codes = weight.data if state.CB is None else state.CB
        scale = weight.SCB if state.SCB is None else state.SCB
        return codes.float() * (scale.float()[:, None] / 127.0)
    from bitsandbytes import functional

    codes, state = weight.data, weight.quant_state
    if vars(state).get("packing_format_for_cpu"):
        # evaluation on a CPU with AVX512-BF16 repacks the weight in place; dequantize_4bit would read it as garbage
        state = copy.copy(state)
        scales = state.absmax.T.reshape(-1).float()  # stored as (in / block, out)
        state.original_nested = False  # the scales are already known: only the order of the codes is to be restored
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales
    return functional.dequantize_4bit(codes, state)


def store(module: nn.Module, weight: Tensor, rows: slice = slice(None)) -> None:
    """Write `weight` into these rows of the module's weight (in its own layout), rounded to its dtype.

    Raises:
        NotMergeable: the module is quantized.
        TargetError: it has no weight tensor.
    """
    if is_quantized(module):
        raise NotMergeable(
            f"{type(module).__name__} stores its weight in 8 or 4 bits; writing an update into it would lose most of the update",
            "replace the module by its 16-bit equivalent first (byway.core.weights.plain)",
        )
    target = module.weight
    if not isinstance(target, Tensor):
        raise TargetError(f"{type(module).__name__} has no weight tensor")
    with torch.no_grad():
        target[rows].copy_(weight)


def disable_repacking(model: nn.Module) -> None:
    """Stop 4-bit maps from repacking their weights for AVX512-BF16 processors.

    bitsandbytes repacks at the first evaluation; from then on dequantizing returns garbage, and inputs get no gradient.
    """
    for module in model.modules():
        if _is_4bit(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def plain(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return an nn.Linear with the dequantized weight of a quantized map; any other module is returned as is.

    `dtype`: use that of the model's activations, since nn.Linear does not cast its input as a quantized map does.
    Default: the dtype of the weight before quantization, bfloat16 where it is not recorded (8-bit).
    """
    if not is_quantized(module) or not isinstance(module, nn.Linear):
        return module
    weight = dense(module)
    dtype = dtype or (weight.dtype if _is_4bit(module) else torch.bfloat16)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device=weight.device, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if module.bias is not None:
            linear.bias.copy_(module.bias)
    linear.requires_grad_(False)
    return linear.train(module.training)


def forget_quantization(model: nn.Module, paths: Sequence[str]) -> None:
    """Tell transformers that the maps at `paths` are no longer quantized; else loading would quantize them again."""
    named = dict(model.named_modules())
    for root, owner in named.items():
        quantizer = vars(owner).get("hf_quantizer")
        if quantizer is None:
            continue
        prefix = f"{root}." if root else ""
        if any(is_quantized(module) for module in owner.modules()):
            config: Any = owner.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            own = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
            config.llm_int8_skip_modules = [*dict.fromkeys([*(config.llm_int8_skip_modules or ()), *own])]
        else:
            quantizer.remove_quantization_config(owner)
            for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
                vars(owner).pop(flag, None)


def factor_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype for trainable factors next to this weight: float64 for a float64 weight, else float32."""
    weight = module.weight
    return torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32


_MARK = "_byway_widened"
"""Attribute that marks a widened map; its ``forward`` cannot tell, since a trained copy may have replaced it."""


def widened(module: nn.Module) -> bool:
    """True if `module` (a map or a whole model) computes in float32 although its weights are stored in 16 bits."""
    return any(_MARK in vars(part) for _, part in base_modules(module))
