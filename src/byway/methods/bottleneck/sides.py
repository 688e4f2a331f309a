"""Bottleneck side paths: f(h) = s·norm(W_up·σ(W_down·h + b_d) + b_u), and where they read and write.

Legend: d the width of the residual stream, m that of the bottleneck; W_down (m, d), W_up (d, m); z what a sub-layer (attention,
feed-forward) adds to the residual x; LN the norm over x + z of a post-norm block.

* :class:`OnOutput` z → z + f(z), on the module that answers z. Houlsby et al., arXiv 1902.00751.
* :class:`OnSum` z → z + f(x + z), the same place, where the block has no norm over the sum.
* :class:`BeforeNorm` LN(x + z) → LN(x + z + f(LN(x + z))), on the norm. Pfeiffer et al., arXiv 2005.00247.
* :class:`Beside` z → z + f(h), h what the sub-layer reads, or x. He et al., arXiv 2110.04366.
* :class:`Tap` remembers what goes into a module, for the two that read at one place and write at another.
* :class:`TrainedNorm` a layer norm whose weight and bias are trained, beside it.

Parameters are float32 (float64 on a float64 base) whatever the base is; the products are computed in the input's dtype.
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

from byway.core.slots import SLOT, Ref, SidePath, base_modules, slot_of

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
"""σ by name; ``swish`` is ``silu``, ``gelu`` the exact one."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that makes one bottleneck but its tensors."""

    width: int
    """d."""
    size: int
    """m."""
    activation: str
    dropout: float = 0.0
    """On what is added, before `layer_norm`."""
    scaling: float | Literal["learned"] = 1.0
    """s; learned: one trained number that starts at 1."""
    layer_norm: Literal["none", "in", "out"] = "none"
    """A layer norm of the bottleneck's own, on what it reads or on what it adds."""
    init: Init = "zero"
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


class Bottleneck(SidePath):
    """f(h) = norm(drop(s·(W_up·σ(W_down·norm(h) + b_d) + b_u))); 2dm + m + d numbers without a norm and a learned s."""

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
        self._start(shape.init, generator)

    def _start(self, init: Init, generator: torch.Generator) -> None:
        """zero: W_down uniform in ±1/√d, W_up zero. houlsby: both truncated normal, 1e-3. bert: both normal, 0.02. Biases zero."""
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
        """f(hidden), in the dtype of hidden."""
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
    """A linear map with nothing drawn yet: torch's own start would move the user's random state."""
    made = nn.utils.skip_init(nn.Linear, inside, outside, **{k: v for k, v in options.items() if v is not None})
    assert isinstance(made, nn.Linear)
    return made


def _normed(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, norm.normalized_shape, norm.weight.to(hidden.dtype), norm.bias.to(hidden.dtype), norm.eps)


def _first(inputs: dict[str, Any]) -> Tensor:
    return next(iter(inputs.values()))


def _edited(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`out`, or its first entry where a module answers several things (attention weights, a router's choice), changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


class OnOutput(Bottleneck):
    """z → z + f(z)."""

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        return _edited(out, lambda z: z + self.branch(z).to(z.dtype))


class OnSum(Bottleneck):
    """z → z + f(x + z), x what `tap` has seen."""

    def __init__(self, shape: Shape, generator: torch.Generator, tap: Tap) -> None:
        super().__init__(shape, generator)
        self.tap = _Tapped(tap)

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        x = self.tap.take()
        return _edited(out, lambda z: z + self.branch(x + z).to(z.dtype))


class BeforeNorm(Bottleneck):
    """On the norm of a post-norm block: its input s = x + z becomes s + f(LN(s)), LN as trained beside the norm, if it is."""

    def __init__(self, shape: Shape, generator: torch.Generator, norm: nn.Module) -> None:
        super().__init__(shape, generator)
        self.base = Ref(norm)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        name, total = next(iter(inputs.items()))
        norm = self.base.module
        normed = norm.forward(total)  # without hooks: this is one of them
        slot = slot_of(norm)
        for side in slot.afters if slot is not None else ():
            if isinstance(side, TrainedNorm):
                normed = side.after({name: total}, normed)
        return inputs | {name: total + self.branch(normed).to(total.dtype)}


class Beside(Bottleneck):
    """z → z + f(h): h is the first argument of the module itself, or what `tap` has seen."""

    def __init__(self, shape: Shape, generator: torch.Generator, tap: Tap | None) -> None:
        super().__init__(shape, generator)
        self.tap = None if tap is None else _Tapped(tap)

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        hidden = _first(inputs) if self.tap is None else self.tap.take()
        return _edited(out, lambda z: z + self.branch(hidden).to(z.dtype))


class Tap(SidePath):
    """Remembers what goes into a module until it is read, once; a thread reads what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # compiled code has no thread of its own to ask for: within one graph what was written is what is read
        self.kept[0 if torch.compiler.is_compiling() else threading.get_ident()] = _first(inputs)
        return inputs

    def take(self) -> Tensor:
        """What went in last; it is forgotten here."""
        own = 0 if torch.compiler.is_compiling() else threading.get_ident()
        found = self.kept.pop(own) if own in self.kept else self.kept.pop(0, None)
        if found is None:
            raise RuntimeError("a bottleneck reads the input of a module that has not run before it; was its forward called directly?")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": {}}  # a copy starts without a forward that broke off halfway


class _Tapped:
    """A tap that is read and not owned: it hangs elsewhere in the same model."""

    __slots__ = ("tap",)

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def take(self) -> Tensor:
        return self.tap.take()


class TrainedNorm(SidePath):
    """y = N(x; w', b'), N a layer norm or RMS norm and w', b' its trained weight and bias; added as a difference to what N answers.

    N is affine in its weights, so y = out + N(x; w' − w, b' − b) − N(x; 0, 0), in which the last term is zero but for norms that scale by
    1 + w. At the start w' = w, and the output is exactly the base's. Several such side paths add up.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base = Ref(module)
        self.form = Ref(_bare(module))
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
        x = _first(inputs)
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
    """A copy of a norm on the CPU without what hangs on it: only its formula is used."""
    twin = copy.deepcopy(module).to_empty(device="cpu").requires_grad_(False)
    for _, part in base_modules(twin):
        part._modules.pop(SLOT, None)
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin
