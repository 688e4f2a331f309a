"""Kept in 16 bits, multiplied in float32: y = x·W↑ᵀ + b, where W↑ is the 16-bit weight as float32, a tile at a time.

A processor without bfloat16 instructions multiplies bfloat16 matrices 5 to 40 times slower than float32 ones. Here everything that flows
through the model is float32, while the weights of its linear maps and embeddings, which are nearly all of it, stay as they are kept: half
the memory of a float32 base, its speed, and its numbers: widening is exact, so this is ``model.float()`` up to the order of summation.
What is small (norms, biases, convolutions), and a weight that somebody reads without calling its module, becomes float32 itself.

Each map gets an instance ``forward`` and nothing else: type, state-dict keys and the weight's bytes stay, side paths hang on it as on any
map, and a trained copy answers in its place. Nothing is kept for the backward pass but a reference to the weight, which is widened again.
Legend: n tokens, i in, o out.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from byway.base.arithmetic.int8 import in_int8
from byway.core.slots import base_modules
from byway.core.weights import _MARK, NewTensor, is_transposed, widened

__all__ = ["computed", "multiplies_bf16", "widen"]

_TILE = 1 << 20
"""Numbers widened at a time (4 MB): as fast as a float32 weight; smaller tiles lose up to a third, larger ones only take memory."""
_NARROW = (torch.bfloat16, torch.float16)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16, AMX; on ARM: bf16)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computed(model: nn.Module) -> str:
    """In what the base is multiplied, as ``base.compute`` calls it: int8, fp32 (over weights kept in 16 bits) or same."""
    return "int8" if in_int8(model) else "fp32" if widened(model) else "same"


def widen(model: nn.Module) -> float:
    """Let `model`, kept in 16 bits, compute in float32, in place; the share of its 16-bit numbers that had to become float32 themselves.

    To be called on a bare base, before anything is attached. A map whose weight requires a gradient is multiplied by ``weight.float()``, so
    that it gets one; frozen ones make no such copy. The share is small but for models whose weights are read past their modules (experts).
    """
    owners: dict[int, list[tuple[str, Any, str]]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in _NARROW:
                owners.setdefault(id(parameter), []).append((path, module, name))
                tensors[id(parameter)] = parameter
    total, grown = sum(tensor.numel() for tensor in tensors.values()), 0
    wide = _wanted_in_float32(model)
    for key, used in owners.items():
        if not all(name == "weight" and _is_plain(module) and not (wide and wide.search(path)) for path, module, name in used):
            grown += tensors[key].numel()
            tensors[key].data = tensors[key].data.float()
            continue
        for _, module, _ in used:
            module.forward = _Embedding(module) if isinstance(module, nn.Embedding) else _Linear(module)
            vars(module)[_MARK] = True
    for _, module in base_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in _NARROW:
                module._buffers[name] = buffer.float()
    return grown / max(total, 1)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module's own ``forward`` is all that reads its weight: subclasses scale it, or leave the reading to their parent."""
    return type(module) in (nn.Linear, nn.Embedding) or is_transposed(module)


def _wanted_in_float32(model: nn.Module) -> re.Pattern[str] | None:
    """The modules that their authors keep in float32 (T5's ``wo``, whose dtype the code before it reads)."""
    # asked of modules already imported: nobody can hold a PreTrainedModel without having imported it
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return None
    base: Any = model
    names = {*(base._keep_in_fp32_modules or ()), *(base._keep_in_fp32_modules_strict or ())}
    return re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)") if names else None


class _Embedding:
    """An instance ``forward``: the rows looked up, as float32. An object, since a bound method would not survive pickling."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        return type(self.module).forward(self.module, input).float()


class _Linear(NewTensor):
    """An instance ``forward`` of a linear map: x (…, i) → y (…, o) in float32."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.transposed = is_transposed(module)

    def __call__(self, input: Tensor) -> Tensor:
        weight: Any = self.module._parameters["weight"]
        bias = self.module._parameters["bias"]
        x = input.float()
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return nn.functional.linear(x, weight.T.float() if self.transposed else weight.float(), bias)
        out: Any = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, self.transposed)
        return out.view(*x.shape[:-1], out.shape[-1])


class _Product(torch.autograd.Function):
    """x (n, i), W (o, i) or, `transposed`, (i, o) → y (n, o). Only x has a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        vars(ctx)["transposed"] = transposed
        out = x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])
        for columns, tile in _tiles(weight, transposed):
            if bias is None:
                torch.mm(x, tile.T, out=out[:, columns])
            else:
                torch.addmm(bias[columns], x, tile.T, out=out[:, columns])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        out: Tensor | None = None
        for columns, tile in _tiles(weight, ctx.transposed):
            out = gradient[:, columns] @ tile if out is None else out.addmm_(gradient[:, columns], tile)
        return out, None, None, None


def _tiles(weight: Tensor, transposed: bool) -> Iterator[tuple[slice, Tensor]]:
    """(which outputs, their rows of W in float32, (some of o, i)); one buffer, overwritten by the next."""
    inputs, outputs = weight.shape if transposed else (weight.shape[1], weight.shape[0])
    rows = min(outputs, max(1, _TILE // max(inputs, 1)))
    buffer = weight.new_empty((inputs, rows) if transposed else (rows, inputs), dtype=torch.float32)
    for start in range(0, outputs, rows):
        part = slice(start, min(start + rows, outputs))
        count = part.stop - start
        if transposed:
            yield part, buffer[:, :count].copy_(weight[:, part]).T
        else:
            yield part, buffer[:count].copy_(weight[part])
