"""Weights kept in 16 bits, products in float32: y = x·W↑ᵀ + b, W↑: a tile of W converted to float32.

A CPU without bfloat16 instructions multiplies bfloat16 matrices 5 to 40 times slower than float32 ones. Here all
activations are float32, while the weights of linear maps and embeddings, nearly all of a model, stay in 16 bits. That
takes half the memory of a float32 base at its speed. The conversion is exact, so the results are those of
``model.float()`` up to the order of summation. Small tensors (norms, biases, convolutions), and weights that are read
without calling their module, are converted to float32 themselves.

A map gets an instance ``forward`` and is otherwise unchanged: same type, state-dict keys and weight bytes. Side paths
attach to it as to any map, and a trained copy replaces it. The backward pass converts the weight again.

Shapes: n tokens, i in, o out.
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
"""Elements converted at a time (4 MB). Smaller tiles are up to a third slower, larger ones not faster."""
_NARROW = (torch.bfloat16, torch.float16)


def multiplies_bf16() -> bool:
    """True if this CPU has instructions for bfloat16 products (AVX512-BF16, AMX; on ARM: bf16)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computed(model: nn.Module) -> str:
    """Return the arithmetic of the base as ``base.compute`` names it: int8, fp32 (weights in 16 bits) or same."""
    return "int8" if in_int8(model) else "fp32" if widened(model) else "same"


def widen(model: nn.Module) -> float:
    """Make `model`, kept in 16 bits, compute in float32, in place. Call it on a bare base, before anything is attached.

    A map whose weight requires a gradient multiplies by ``weight.float()`` to get one; a frozen map makes no such copy.

    Returns:
        the share of 16-bit parameters that had to be converted to float32. It is small, except for models that read
        weights without calling their modules (experts).
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
        # subclasses of the plain types may scale the weight, or let a parent read it
        plain = all(type(module) in (nn.Linear, nn.Embedding) or is_transposed(module) for _, module, _ in used)
        if not plain or not all(name == "weight" and not (wide and wide.search(path)) for path, _, name in used):
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


def _wanted_in_float32(model: nn.Module) -> re.Pattern[str] | None:
    """Return a pattern of the modules that transformers keeps in float32, such as T5's ``wo``."""
    # look only in imported modules: a PreTrainedModel cannot exist unless its module was imported
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return None
    base: Any = model
    names = {*(base._keep_in_fp32_modules or ()), *(base._keep_in_fp32_modules_strict or ())}
    return re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)") if names else None


class _Embedding:
    """The ``forward`` of an embedding. An object, because a bound method does not survive pickling."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        return type(self.module).forward(self.module, input).float()


class _Linear(NewTensor):
    """The instance ``forward`` of a linear map: x (…, i) → y (…, o) in float32."""

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
    """x (n, i), W (o, i) or, if `transposed`, (i, o) → y (n, o). Only x has a gradient."""

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
    """Yield (slice of outputs, their rows of W (rows, i) in float32). All tiles use the same buffer."""
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
