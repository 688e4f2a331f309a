"""A chain of weight transforms as one side path: W' = f_k(… f_1(W)), y = f(x) + (W' − W)x.

A link is an ``nn.Module`` that maps a matrix to one of the same shape. The matrix has a row per output feature: (out,
in) of a linear map, (out, in·k…) of a convolution, (width, entries) of an embedding; float32 (float64 on a float64
base) whatever the dtype of the base. Each link is constructed with the output of the links before it, so that a
magnitude can start at the row norms that it receives.

The difference W' − W is taken in float32 and multiplied in the dtype of x. So a small change of a bfloat16 weight is
not rounded away, other side paths at the module still apply, and a quantized base keeps its own kernel. The cost is
that every forward forms W' and its gradient (out·in values per module) and one more product with x. Dropout on the
input cannot be expressed in this form.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.registry import module_at
from byway.core.slots import ModuleRef, SidePath, first
from byway.core.weights import dense, factor_dtype, is_embedding
from byway.errors import ConfigError, TargetError, nearest
from byway.methods.lowrank.magnitude import row_norms
from byway.methods.lowrank.sides import as_rows, like_weight

__all__ = ["LINKS", "Chain", "LowRankLink", "MagnitudeLink", "link_class"]


class LowRankLink(nn.Module):
    """W ↦ W + (alpha/rank)·BA; A (rank, columns) drawn as in LoRA, B (rows, rank) zero."""

    def __init__(self, weight: Tensor, *, rank: int = 8, alpha: float = 16.0, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = 1.0 / math.sqrt(columns)
        a = torch.empty(rank, columns, dtype=weight.dtype).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_B @ self.lora_A)


class MagnitudeLink(nn.Module):
    """V ↦ m·V/‖V‖ per row; m (rows,) starts as ‖V‖, and the norm is a constant in the backward pass.

    A row of zeros is left unchanged.
    """

    def __init__(self, weight: Tensor, *, generator: torch.Generator) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(row_norms(weight))

    def forward(self, weight: Tensor) -> Tensor:
        norms = row_norms(weight.detach())
        there = norms > 0
        ratio = torch.where(there, self.magnitude / torch.where(there, norms, 1.0), 1.0)
        return ratio[:, None] * weight


LINKS: Mapping[str, type[nn.Module]] = {"low_rank": LowRankLink, "magnitude": MagnitudeLink}
"""The links that Byway provides, by name; their constructors take the matrix, options, and a generator."""


def link_class(name: str, *, trusted: bool) -> type[nn.Module]:
    """Return the user's class at an import path, ``package.module:Class``.

    Args:
        trusted: False if the name comes from a file; then the module must already be imported.

    Raises:
        ConfigError: it cannot be imported, or is not an nn.Module.
    """
    module_name, _, class_name = name.partition(":")
    if not trusted and module_name not in sys.modules:
        raise ConfigError(
            f"link {name!r}: no code is imported because a file names it", "load it with allow_import=True (--allow-import) if you trust it"
        )
    module = module_at(name, "link")
    found = vars(module).get(class_name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        modules = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise ConfigError(f"link {name!r}: {module_name} has no nn.Module of that name", nearest(class_name, modules))
    return found


class Chain(SidePath):
    """y = f(x) + (W' − W)x; the links are its children, starting with ``links.0``."""

    def __init__(self, module: nn.Module, makers: list[Callable[[Tensor], nn.Module]], where: str) -> None:
        super().__init__()
        self.base = ModuleRef(module)
        self.dtype = factor_dtype(module)
        self.links = nn.ModuleList()
        matrix = self.matrix()
        for number, make in enumerate(makers):
            link = make(matrix)
            with torch.no_grad():
                after = link(matrix)
            if not isinstance(after, Tensor) or after.shape != matrix.shape:
                what = f"shape {list(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
                raise TargetError(
                    f"link {number} ({type(link).__name__}) at {where} turns a matrix of shape {list(matrix.shape)} into {what}",
                    "a link must return a matrix of the same shape",
                )
            self.links.append(link)
            matrix = after

    def matrix(self) -> Tensor:
        """Return W, with a row per output feature."""
        return as_rows(self.base.module, dense(self.base.module)).to(self.dtype)

    def change(self) -> Tensor:
        """Return W' − W, in the same layout."""
        matrix = start = self.matrix()
        for link in self.links:
            matrix = link(matrix)
        return matrix - start

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x, module, change = first(inputs), self.base.module, self.change()
        if is_embedding(module):
            return out + F.embedding(x, change.T).to(out.dtype)
        change = change.to(x.dtype)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return out + module._conv_forward(x, change.reshape(module.weight.shape), None).to(out.dtype)
        return out + F.linear(x, change).to(out.dtype)

    @torch.no_grad()
    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        return tensors | {"weight": weight + like_weight(self.base.module, self.change(), weight.shape).to(weight.dtype)}
