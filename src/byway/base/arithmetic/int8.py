"""Frozen maps multiplied in 8 bits: y = s·t·(q(x)·q(W)ᵀ) + b approximates x·Wᵀ + b. Used only if the user asks for it.

    q(x) = round(x·H / s) in [−127, 127],  s = max|x·H| / 127 of each token (a row)      computed in every forward pass
    q(W) = round(W·H / t) in [−127, 127],  t = max|W·H| / 127 of each output channel     computed once, kept next to W
    ∂x   = ∂y·W                                                                          in W's dtype, as in a plain map

H is orthogonal and spreads the few large channels of an activation over the others
(:mod:`byway.base.arithmetic.integers`). The integer product is exact (int32), so rounding is the only error: |y − ŷ| ≤
Σ|x·H|·t/2 + Σ|ŵ|·s/2. The backward pass uses the weight itself, so the error of a gradient is that of the activations
alone; merging, saving and fingerprints read W as always. It costs one more byte per element of a map (bf16: 3
instead of 2, fp32: 5 instead of 4).

Only maps inside the layers are multiplied this way; heads, embeddings, norms and all trainable parameters are not, and
a side path reads the unrounded x. As in :mod:`byway.base.arithmetic.float32` a map gets an instance ``forward`` and is
otherwise unchanged. Rounding is to the nearest integer, halves to even. Source: LLM.int8(), arXiv 2208.07339 §2
(vector-wise quantization); a rotation replaces its §3.

Shapes: n tokens, i in, o out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from byway.base.arithmetic.integers import FEWEST_ROWS, STEP, hadamard, multiplied, multiplies_int8, quantized, rotated
from byway.core.families import facts
from byway.core.modes import evaluating
from byway.core.slots import base_modules, slots
from byway.core.weights import NewTensor, is_linear, is_quantized, is_transposed
from byway.errors import ConfigError, TargetError, listed

__all__ = ["Error", "described", "exact_products", "in_int8", "measure", "multiply_in_int8", "multiply_plainly", "uncovered"]

_AT_ONCE = 1 << 24
"""Elements of a product that are held as int32 at a time (64 MB)."""
_LARGEST_ERROR = 0.1
"""Largest accepted relative error of the loss."""
_SMALL_LOSS = 0.1
"""The error is relative to this if the loss is smaller: text known by heart has nearly no loss."""


class Loss(Protocol):
    """The loss of a task: returns the SUM over the labels of a batch, and their number."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]: ...


# ---------------------------------------------------------------- the model


def multiply_in_int8(model: nn.Module) -> tuple[str, ...]:
    """Make the maps of the layers multiply in 8 bits, in place. Call it before anything is attached.

    A map whose weight or bias requires a gradient multiplies plainly.

    Returns:
        the paths of maps that multiply plainly because of their sizes.

    Raises:
        ConfigError: the base is quantized or kept in float64, its layers are not known, no map has suitable sizes, or
            the device has no such product.
    """
    if any(is_quantized(module) for module in model.modules()):
        raise ConfigError(
            "compute 'int8' needs a base kept in 16 or 32 bits; this one is quantized, and its maps have their own products",
            "use the base that is not quantized, or leave compute out",
        )
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise ConfigError("compute 'int8' would waste the precision of a base kept in float64", "leave compute out")
    maps = dict(_maps(model))
    foreign = [path for path, module in maps.items() if "forward" in vars(module) and _int8_forward(module) is None]
    if foreign:
        raise ConfigError(
            f"compute 'int8': the forward of {listed(foreign, 3)} was replaced by another library, or is computed in float32 already",
            "use one device (base.device), or leave compute out",
        )
    sizes = {path: module._parameters["weight"] for path, module in maps.items()}
    chosen = [maps[p] for p, weight in sizes.items() if weight is not None and all(n > 0 and n % STEP == 0 for n in weight.shape)]
    if not chosen:
        raise ConfigError(
            f"compute 'int8': of the {len(maps)} linear maps in the layers of {type(model).__name__} none has sizes that are "
            f"multiples of {STEP}, so none can be multiplied in 8 bits",
            "leave compute out",
        )
    for module in chosen:
        forward = _Int8(module)
        forward.codes()
        module.forward = forward
    weight: Any = chosen[0]._parameters["weight"]
    try:
        with torch.no_grad():
            chosen[0](weight.new_ones(1, weight.shape[0 if is_transposed(chosen[0]) else 1]))
    except RuntimeError as error:
        multiply_plainly(model)
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(
            f"compute 'int8': {weight.device} has no product of 8-bit matrices here ({reason})", "leave compute out"
        ) from error
    return uncovered(model)


def multiply_plainly(model: nn.Module) -> None:
    """Undo :func:`multiply_in_int8`. Call it on a bare base."""
    for _, module in base_modules(model):
        if _int8_forward(module) is not None:
            del vars(module)[_MARK]
            del module.forward


def in_int8(model: nn.Module) -> bool:
    """True if maps of `model` (or `model` itself, a map) multiply in 8 bits."""
    return any(_int8_forward(module) is not None for _, module in base_modules(model))


def uncovered(model: nn.Module) -> tuple[str, ...]:
    """Return the maps in the layers of a model :func:`in_int8` that multiply plainly because of their sizes."""
    return tuple(path for path, module in _maps(model) if _int8_forward(module) is None)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Multiply plainly within this context, also in other threads, as backward passes need."""
    before = [(forward, forward.exact) for _, module in base_modules(model) if (forward := _int8_forward(module)) is not None]
    for forward, _ in before:
        forward.exact = True
    try:
        yield
    finally:
        for forward, exact in before:
            forward.exact = exact


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear maps of the layers whose weight only their own ``forward`` reads, by path."""
    try:
        stacks = facts(model).require("stacks")
    except TargetError as error:
        raise ConfigError(f"compute 'int8': {error.message}", "leave compute out") from error
    layers = tuple(f"{path}." for stack in stacks.values() for path in stack)
    for path, module in base_modules(model):
        if path.startswith(layers) and is_linear(module) and (type(module) is nn.Linear or is_transposed(module)):
            yield path, module


def _int8_forward(module: nn.Module) -> _Int8 | None:
    """Return the 8-bit forward of a map, even if a side path computes in its place; None if it has none."""
    found = vars(module).get(_MARK)
    return found if isinstance(found, _Int8) else None


# ---------------------------------------------------------------- one map


_MARK = "_byway_int8"
"""Attribute of a map for its 8-bit forward, because a trained copy may replace ``forward``."""


class _Int8(NewTensor):
    """The instance ``forward`` of a linear map. An object, because a bound method does not survive pickling."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.transposed = is_transposed(module)
        self.exact = False
        self.native = True
        self._made: tuple[Any, Tensor, Tensor, Tensor] | None = None
        vars(module)[_MARK] = self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}  # the weight of a copy is another tensor

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q(W) (o, i), t (o,) and the block of H (k, k), computed again if the weight has changed."""
        weight: Any = self.module._parameters["weight"]
        if self._made is not None and torch.compiler.is_compiling():
            return self._made[1:]
        state = (weight.data_ptr(), weight.dtype, weight.device, 0 if weight.is_inference() else weight._version)
        if self._made is None or self._made[0] != state:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                matrix = weight.T if self.transposed else weight
                block = hadamard(matrix.shape[1], matrix.device)
                self.native = multiplies_int8(matrix.device.type)  # compiled code cannot ask
                codes, scale = quantized(rotated(matrix.float(), block))
            self._made = (state, codes.contiguous(), scale[:, 0], block)
        return self._made[1:]

    def __call__(self, input: Tensor) -> Tensor:
        weight: Any = self.module._parameters["weight"]
        bias = self.module._parameters["bias"]
        trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if trained or self.exact:
            return type(self.module).forward(self.module, input)
        out: Any = _Product.apply(input.reshape(-1, input.shape[-1]), weight, bias, *self.codes(), self.transposed, self.native)
        return out.view(*input.shape[:-1], out.shape[-1])


class _Product(torch.autograd.Function):
    """x (n, i) → y (n, o) in the dtype of x. Only x has a gradient. Saved is a reference to W, and nothing of x."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        block: Tensor,
        transposed: bool,
        native: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        vars(ctx)["transposed"] = transposed
        out = x.new_empty(x.shape[0], codes.shape[0])
        rows = max(FEWEST_ROWS, _AT_ONCE // codes.shape[0])
        with torch.autocast(x.device.type, enabled=False):  # 16 bits hold neither the rotated rows nor the integers
            for start in range(0, x.shape[0], rows):
                own, step = quantized(rotated(x[start : start + rows], block))
                part = multiplied(own, codes, native=native).float().mul_(step).mul_(scale)
                out[start : start + rows] = part if bias is None else part.add_(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # no copy, except under autocast
        return gradient @ (weight.T if ctx.transposed else weight), *(None,) * 7


# ---------------------------------------------------------------- the error


@dataclass(frozen=True)
class Error:
    """The effect of 8-bit products on one batch, compared with plain ones."""

    plain: float
    """Mean loss with plain products."""
    loss: float
    """(loss − plain) / plain."""
    gradients: float
    """‖g − g₀‖ / ‖g₀‖ over all trainable parameters."""

    def __str__(self) -> str:
        return f"loss {self.loss:+.2%}, gradients {self.gradients:.1%} off on the probe"


def measure(model: nn.Module, batch: Mapping[str, Any], loss: Loss) -> Error:
    """Measure the error of loss and gradients on `batch`, in evaluation mode.

    Raises:
        ConfigError: the loss is off by more than a tenth or is NaN: 8-bit products do not work for this base.
    """
    with evaluating(model):
        own, gradients = _loss_and_gradients(model, batch, loss)
        with exact_products(model):
            plain, expected = _loss_and_gradients(model, batch, loss)
    size = _norm(expected)
    apart = _norm([a.double() - b.double() for a, b in zip(gradients, expected, strict=True)])
    error = Error(plain, (own - plain) / max(abs(plain), 1e-12), apart / size if size > 0 else apart)
    # comparisons with NaN are false, so a NaN loss is refused too
    if not abs(own - plain) <= _LARGEST_ERROR * max(abs(plain), _SMALL_LOSS):
        raise ConfigError(
            f"base.compute is int8, but its loss is {own:.4g} on the first rows, where the plain products give {plain:.4g}: "
            "8 bits per token are too few for the activations of this base",
            "set base.compute: auto",
        )
    return error


def described(error: Error, model: nn.Module, *, slow: bool) -> str:
    """Describe the error for the plan. `slow`: this processor has no instructions for 8-bit products."""
    plain = uncovered(model)
    parts = [f"int8 products: approximate ({error}"]
    if plain:
        parts.append(
            f"{len(plain)} of {len(list(_maps(model)))} maps plain, as their sizes are not multiples of {STEP}: {listed(plain, 3)}"
        )
    if slow:
        parts.append("no gain here: this CPU has no 8-bit dot products, so they are multiplied as float32")
    return "; ".join(parts) + ")"


def _loss_and_gradients(model: nn.Module, batch: Mapping[str, Any], loss: Loss) -> tuple[float, list[Tensor]]:
    trained = [p for _, _, slot in slots(model) for _, side in slot.sides() for p in side.parameters() if p.requires_grad]
    total, count = loss(model, batch, labels_only=False)
    found = torch.autograd.grad(total / max(count, 1), trained, allow_unused=True) if trained else ()
    return float(total.detach()) / max(count, 1), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def _norm(tensors: list[Tensor]) -> float:
    return sum(float(t.double().pow(2).sum()) for t in tensors) ** 0.5
