"""Bottleneck side paths: f(h) = s·norm(W_up·σ(W_down·h + b_d) + b_u), and where they read and write.

Notation: d width of the residual stream, m width of the bottleneck; W_down (m, d), W_up (d, m); z the output that a
sub-layer (attention, feed-forward) adds to the residual x; LN the norm over x + z of a post-norm block.

* :class:`OnOutput` z → z + f(z), on the module that computes z. Houlsby et al., arXiv 1902.00751.
* :class:`OnSum` z → z + f(x + z), at the same place, if the block has no norm over the sum.
* :class:`BeforeNorm` LN(x + z) → LN(x + z + f(LN(x + z))), on the norm. Pfeiffer et al., arXiv 2005.00247.
* :class:`Beside` z → z + f(h), h the input of the sub-layer, or x. He et al., arXiv 2110.04366.
* :class:`Tap` keeps the input of a module, for the two that read at one place and write at another.
* :class:`TrainedNorm` trains the weight and bias of a layer norm.

Parameters are float32 (float64 on a float64 base) whatever the dtype of the base; products use the input's dtype.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.slots import SLOT, ModuleRef, SidePath, base_modules, first, slot_of

__all__ = ["ACTIVATIONS", "BeforeNorm", "Beside", "Bottleneck", "Init", "OnOutput", "OnSum", "Shape", "Tap", "TrainedNorm"]

Init = Literal["zero", "houlsby", "bert"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        "silu": F.silu,
        "swish": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "leaky_relu": F.leaky_relu,
    }
)
"""σ by name; ``swish`` is ``silu``, and ``gelu`` is exact."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything about one bottleneck except its tensors."""

    width: int
    """d."""
    size: int
    """m."""
    activation: str
    dropout: float = 0.0
    """Dropout probability on the output, before `layer_norm`."""
    scaling: float | Literal["learned"] = 1.0
    """s; ``learned``: a trainable scalar that starts at 1."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """A layer norm of the bottleneck's own, on its input or its output."""
    init: Init = "zero"
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


class Bottleneck(SidePath):
    """f(h) = norm(drop(s·(W_up·σ(W_down·norm(h) + b_d) + b_u))).

    It has 2dm + m + d parameters, without a norm and a learned s.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self.down = _linear(shape.width, shape.size, options)
        self.up = _linear(shape.size, shape.width, options)
        self.norm = None if shape.layer_norm == "none" else nn.LayerNorm(shape.width, **options)
        self.scaling = nn.Parameter(torch.ones(1, **options)) if shape.scaling == "learned" else None
        self.activation = ACTIVATIONS[shape.activation]
        self.factor = 1.0 if isinstance(shape.scaling, str) else shape.scaling
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout > 0 else None
        self._initialize(shape.init, generator)

    def _initialize(self, init: Init, generator: torch.Generator) -> None:
        """Set the biases to zero and draw the weights.

        ``zero``: W_down uniform in ±1/√d, W_up zero. ``houlsby``: both truncated normal, 1e-3. ``bert``: both normal,
        0.02.
        """
        with torch.no_grad():
            for linear in (self.down, self.up):
                start = torch.zeros(linear.weight.shape, dtype=linear.weight.dtype)
                if init == "houlsby":
                    nn.init.trunc_normal_(start, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
                elif init == "bert":
                    start.normal_(0.0, 0.02, generator=generator)
                elif linear is self.down:
                    bound = 1.0 / math.sqrt(self.shape.width)
                    start.uniform_(-bound, bound, generator=generator)
                linear.weight.copy_(start)
                linear.bias.zero_()

    def branch(self, hidden: Tensor) -> Tensor:
        """Return f(hidden), in the dtype of `hidden`."""
        if self.norm is not None and self.shape.layer_norm == "in":
            hidden = _normed(self.norm, hidden)
        dtype = hidden.dtype
        narrow = F.linear(hidden, self.down.weight.to(dtype), self.down.bias.to(dtype))  # (..., m)
        narrow = self.activation(narrow)
        wide = F.linear(narrow, self.up.weight.to(dtype), self.up.bias.to(dtype))  # (..., d)
        if self.scaling is not None:
            wide = wide * self.scaling.to(dtype)
        elif self.factor != 1.0:
            wide = wide * self.factor
        if self.dropout is not None:
            wide = self.dropout(wide)
        if self.norm is not None and self.shape.layer_norm == "out":
            wide = _normed(self.norm, wide)
        return wide


def _linear(inside: int, outside: int, options: dict[str, Any]) -> nn.Linear:
    """Return an uninitialized linear map: torch's initialization would advance the user's random state."""
    made = nn.utils.skip_init(nn.Linear, inside, outside, **{k: v for k, v in options.items() if v is not None})
    assert isinstance(made, nn.Linear)
    return made


def _normed(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, norm.normalized_shape, norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype), norm.eps)


def _edited(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change `out`, or its first entry if a module returns a tuple (attention weights, a router's choice)."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


class OnOutput(Bottleneck):
    """z → z + f(z)."""

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        return _edited(out, lambda z: z + self.branch(z).to(z.dtype))


class OnSum(Bottleneck):
    """z → z + f(x + z), with x from `tap`."""

    def __init__(self, shape: Shape, generator: torch.Generator, tap: Tap) -> None:
        super().__init__(shape, generator)
        self.tap = ModuleRef(tap)

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        x = _taken(self.tap)
        return _edited(out, lambda z: z + self.branch(x + z).to(z.dtype))


class BeforeNorm(Bottleneck):
    """On the norm of a post-norm block: its input s = x + z becomes s + f(LN(s)), LN with trained weights, if any."""

    def __init__(self, shape: Shape, generator: torch.Generator, norm: nn.Module) -> None:
        super().__init__(shape, generator)
        self.base = ModuleRef(norm)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        name, total = next(iter(inputs.items()))
        norm = self.base.module
        normed = norm.forward(total)  # bypass the hooks: this code runs in one of them
        slot = slot_of(norm)
        for side in slot.afters if slot is not None else ():
            if isinstance(side, TrainedNorm):
                normed = side.after({name: total}, normed)
        return inputs | {name: total + self.branch(normed).to(total.dtype)}


class Beside(Bottleneck):
    """z → z + f(h), with h from `tap`, or the first argument of the module itself."""

    def __init__(self, shape: Shape, generator: torch.Generator, tap: Tap | None) -> None:
        super().__init__(shape, generator)
        self.tap = None if tap is None else ModuleRef(tap)

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        hidden = first(inputs) if self.tap is None else _taken(self.tap)
        return _edited(out, lambda z: z + self.branch(hidden).to(z.dtype))


class Tap(SidePath):
    """Keep the input of a module until it is read, once; each thread reads its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # compiled code cannot ask for its thread; within one graph, the last write is what is read
        self.kept[0 if torch.compiler.is_compiling() else threading.get_ident()] = first(inputs)
        return inputs

    def take(self) -> Tensor:
        """Return the last input and drop it."""
        own = 0 if torch.compiler.is_compiling() else threading.get_ident()
        found = self.kept.pop(own) if own in self.kept else self.kept.pop(0, None)
        if found is None:
            raise RuntimeError("a bottleneck reads the input of a module that has not run yet; was its forward called directly?")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": {}}  # a copy must not contain the state of an interrupted forward


def _taken(tap: ModuleRef) -> Tensor:
    assert isinstance(tap.module, Tap)
    return tap.module.take()


class TrainedNorm(SidePath):
    """y = N(x; w', b'), N a layer norm or RMS norm, with trained w' and b'; computed as a change of N's output.

    N is affine in its weights, so y = out + N(x; w' − w, b' − b) − N(x; 0, 0). The last term is zero except for norms
    that scale by 1 + w. w' starts as w, and then the output is exactly the base's. Several such side paths add up.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base = ModuleRef(module)
        self.form = ModuleRef(_bare(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                trained = parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
                self.register_parameter(name, nn.Parameter(trained))
        width = next(iter(self._parameters.values()))
        assert width is not None
        probe = torch.linspace(-1, 1, width.numel(), dtype=width.dtype).reshape(width.shape)
        zeros = {name: torch.zeros_like(p, device="cpu") for name, p in self._parameters.items() if p is not None}
        self.constant = bool(torch.func.functional_call(self.form.module, zeros, (probe,)).abs().sum() > 0)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        x = first(inputs)
        deltas: dict[str, Tensor] = {}
        for name, base in self.base.module._parameters.items():
            own = self._parameters.get(name)
            if own is not None and base is not None:
                deltas[name] = (own - base).to(base.dtype)
        change = torch.func.functional_call(self.form.module, deltas, (x,))
        if self.constant:
            zeros = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
            change = change - torch.func.functional_call(self.form.module, zeros, (x,))
        return out + change.to(out.dtype)


def _bare(module: nn.Module) -> nn.Module:
    """Return a copy of a norm on the CPU without side paths and hooks: only its formula is used."""
    twin = copy.deepcopy(module).to_empty(device="cpu").requires_grad_(False)
    for _, part in base_modules(twin):
        part._modules.pop(SLOT, None)
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin
