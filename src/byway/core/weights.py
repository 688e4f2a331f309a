"""How a weight is kept: the one file that knows nn.Linear, GPT-2's Conv1D, convolutions, embeddings, 8-bit and 4-bit.

Legend: ``(out, in)`` is a linear map's shape in torch, ``(in, out)`` in transformers' Conv1D. A method never names a quantizer: it asks
:func:`dense` for a weight, :func:`features` for its sizes and :func:`store` to put one back.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import base_modules
from byway.errors import NotMergeable, TargetError

__all__ = [
    "NewTensor",
    "dense",
    "device_of",
    "factor_dtype",
    "features",
    "forget_quantization",
    "gives_a_new_tensor",
    "is_conv",
    "is_embedding",
    "is_linear",
    "is_norm",
    "is_quantized",
    "is_transposed",
    "odd_output",
    "plain",
    "settle",
    "store",
    "widened",
]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear map with a 2-D weight: nn.Linear (8-bit and 4-bit too) or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (in, out): transformers' Conv1D, as in GPT-2."""
    # asked of modules already imported: nobody can hold a Conv1D without having imported it
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


class NewTensor:
    """Base class of instance ``forward`` objects of this package whose result is a new tensor that nobody else holds."""


def gives_a_new_tensor(module: nn.Module) -> bool:
    """True if the output of this linear map is known to be a new tensor, the result of a matrix product, that nobody else holds.

    Only then may a side path write into it. The output of another ``forward`` may be a view of a tensor outside the autograd graph
    (bitsandbytes), the input itself, or something the module keeps.
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
    """What the ``forward`` of an ``nn.Linear`` subclass returns in place of one (..., out) tensor, in words; ``""`` if it does return that.

    A router of a mixture of experts often subclasses ``nn.Linear`` and returns a tuple. A forward of the subclass's own is tried on one row
    of zeros; one that requires further arguments is not tried.
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
            return f"takes no (rows, in_features) input ({type(error).__name__})"
    if not isinstance(out, Tensor):
        return f"returns a {type(out).__name__}, not one tensor"
    if out.shape != (1, module.out_features):
        return f"returns shape {tuple(out.shape)} for one row, not (1, {module.out_features})"
    return ""


def is_conv(module: nn.Module) -> bool:
    """Whether `module` is a 1-, 2- or 3-dimensional convolution (not a transposed one)."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` looks vectors up by index."""
    return isinstance(module, nn.Embedding)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalization with trained numbers of its own: torch's, or a model's own class (LlamaRMSNorm, T5LayerNorm)."""
    # the models' own classes have no common base: what they share is the name, a weight and nothing inside
    return "Norm" in type(module).__name__ and module._parameters.get("weight") is not None and not any(_children(module))


def _children(module: nn.Module) -> Iterator[nn.Module]:
    return (child for name, child in module._modules.items() if child is not None and name != "byway")


def _bitsandbytes() -> ModuleType | None:
    return sys.modules.get("bitsandbytes")


def _is_4bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def _is_8bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt)


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is kept in 8 or 4 bits (bitsandbytes), so that it cannot be written without loss."""
    return _is_4bit(module) or _is_8bit(module)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear map, (entries, width) of an embedding, (in, out) channels of a convolution.

    Read from the module's own numbers: the shape of a 4-bit weight is that of its packed bytes.
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
        f"{type(module).__name__} has no weight that a low-rank update fits", "target linear maps, embeddings or convolutions"
    )


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weight lives, which is where its side path belongs."""
    tensor = next(module.parameters(recurse=False), None)
    if tensor is None:
        tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def dense(module: nn.Module) -> Tensor:
    """The weight as a floating-point tensor in the module's own layout; 8-bit and 4-bit ones are dequantized (a new tensor)."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TargetError(f"{type(module).__name__} has no weight tensor")
    if _is_4bit(module):
        return _dense_4bit(weight)
    if _is_8bit(module):
        state, kept = _state_of(module)
        codes = kept.data if state.CB is None else state.CB
        scale = kept.SCB if state.SCB is None else state.SCB
        return codes.float() * (scale.float()[:, None] / 127.0)
    return weight.detach()


def _dense_4bit(weight: Any) -> Tensor:
    from bitsandbytes import functional

    codes, state = weight.data, weight.quant_state
    if vars(state).get("packing_format_for_cpu"):
        # an evaluation on a CPU with AVX512-BF16 has re-packed the weight in place, and bitsandbytes' own function reads that as garbage
        state = copy.copy(state)
        scales = state.absmax.T.reshape(-1).float()  # kept as (in / block, out)
        state.original_nested = False  # the scales are at hand: what is asked for is the codes in their own order
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales
    return functional.dequantize_4bit(codes, state)


def _state_of(module: nn.Module) -> tuple[Any, Any]:
    """bitsandbytes' own state and weight of an 8-bit map: the codes move from one to the other at the first forward."""
    return module.state, module.weight


def store(module: nn.Module, weight: Tensor, rows: slice = slice(None)) -> None:
    """Write `weight`, these rows of it, into the module (its own layout), rounded to the dtype it keeps. A quantized one is refused."""
    if is_quantized(module):
        raise NotMergeable(
            f"{type(module).__name__} keeps its weight in 8 or 4 bits: writing an update into it would lose most of the update",
            "replace the module by its 16-bit equal first (byway.core.weights.plain)",
        )
    target = module.weight
    if not isinstance(target, Tensor):
        raise TargetError(f"{type(module).__name__} has no weight tensor")
    with torch.no_grad():
        target[rows].copy_(weight)


def settle(model: nn.Module) -> None:
    """Keep every 4-bit map from re-packing its bytes for AVX512-BF16 processors.

    bitsandbytes does that at the first evaluation; afterwards dequantizing returns garbage and the input gets no gradient at all.
    """
    for module in model.modules():
        if _is_4bit(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def plain(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same linear map as an ordinary nn.Linear that holds the dequantized weight; a module that is not quantized is returned as it is.

    dtype: that of what flows through the model, since an ordinary map does not cast its input as a quantized one does; default the one that
    the weight had before it was quantized, bfloat16 where that is not recorded (8-bit).
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
    """Tell transformers that the maps at `paths` are ordinary now: a saved model would otherwise be quantized again on loading."""
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
    """float64 beside a float64 weight, else float32."""
    weight = module.weight
    return torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32


_MARK = "_byway_widened"
"""How a map says that it was widened: a plain attribute, since its forward may be covered by a trained copy's."""


def widened(module: nn.Module) -> bool:
    """Whether `module` (a map, or a whole model) answers in float32 though its weights are kept in 16 bits."""
    return any(_MARK in vars(part) for _, part in base_modules(module))
