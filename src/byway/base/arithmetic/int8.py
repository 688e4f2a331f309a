"""Frozen maps multiplied in 8 bits: y = s·t·(q(x)·q(W)ᵀ) + b, an approximation of x·Wᵀ + b that nobody but the user chooses.

    q(x) = round(x·H / s) in [−127, 127],  s = max|x·H| / 127 of each token (a row)          made anew in every forward
    q(W) = round(W·H / t) in [−127, 127],  t = max|W·H| / 127 of each output channel         made once, kept beside W
    ∂x   = ∂y·W                                                                              in W's own dtype, as the plain map's

H is orthogonal and spreads the few large channels of an activation over the others (:mod:`byway.base.arithmetic.integers`). The integer
product is exact (int32), so the only loss is the rounding: |y − ŷ| ≤ Σ|x·H|·t/2 + Σ|ŵ|·s/2. The backward pass uses the weight as it is
kept, so its error is that of the activations alone, and W stays what merging, saving and fingerprints read. The price is memory: one byte
more for each number of a map (bf16: 3 instead of 2, fp32: 5 instead of 4), never less.

Only maps inside the layers are multiplied so; heads, embeddings, norms and whatever is trained are not, and a side path reads the x that
came in. As in :mod:`byway.base.arithmetic.float32` a map gets an instance ``forward`` and nothing else: type, state-dict keys and bytes
stay. Rounding is to the nearest, halves to even. Source: LLM.int8(), arXiv 2208.07339 §2 (vector-wise); a rotation replaces §3.
Legend: n tokens, i in, o out.
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
from byway.core.slots import base_modules, slots
from byway.core.weights import NewTensor, is_linear, is_quantized, is_transposed
from byway.errors import ConfigError, TargetError, listed

__all__ = [
    "Error",
    "described",
    "exact_products",
    "in_int8",
    "measure",
    "multiply_in_int8",
    "multiply_plainly",
    "uncovered",
]

_AT_ONCE = 1 << 24
"""Numbers of a product that are int32 at a time (64 MB)."""
_LARGEST_ERROR = 0.1
_SMALL_LOSS = 0.1
"""Below this loss the largest error is a share of this number: what has been learnt by heart has no loss to be a share of."""


class Loss(Protocol):
    """A task's loss: the SUM over the labels of a batch, and their number."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]: ...


# ---------------------------------------------------------------- the model


def multiply_in_int8(model: nn.Module) -> tuple[str, ...]:
    """Let the maps of the model's layers multiply in 8 bits, in place; the paths of those that cannot, since their sizes do not fit.

    To be called on a bare base, before anything is attached. A map whose weight or bias requires a gradient is multiplied plainly.

    Raises:
        ConfigError: the base is quantized or kept in float64, its layers are not known, no map fits, or the device has no such product.
    """
    _check(model)
    maps = dict(_maps(model))
    foreign = [path for path, module in maps.items() if "forward" in vars(module) and _behind(module) is None]
    if foreign:
        raise ConfigError(
            f"compute 'int8': the forward of {listed(foreign, 3)} is another library's, or is computed in float32 already",
            "use one device (base.device), or leave it out",
        )
    chosen = [module for module in maps.values() if _fits(module)]
    if not chosen:
        raise ConfigError(
            f"compute 'int8': of the {len(maps)} linear maps in the layers of {type(model).__name__} none has sizes that are "
            f"multiples of {STEP}, so none can be multiplied in 8 bits",
            "leave it out",
        )
    for module in chosen:
        forward = _Int8(module)
        forward.codes()
        module.forward = forward
    try:
        _try_out(chosen[0])
    except ConfigError:
        multiply_plainly(model)
        raise
    return uncovered(model)


def multiply_plainly(model: nn.Module) -> None:
    """Undo :func:`multiply_in_int8`: the maps are what they were. To be called on a bare base."""
    for _, module in base_modules(model):
        if _behind(module) is not None:
            del vars(module)[_MARK]
            del module.forward


def in_int8(model: nn.Module) -> bool:
    """Whether maps of `model` (or `model` itself, a map) are multiplied in 8 bits."""
    return any(_behind(module) is not None for _, module in base_modules(model))


def uncovered(model: nn.Module) -> tuple[str, ...]:
    """Paths of the maps in the layers of a model :func:`in_int8` that are multiplied plainly, because of their sizes."""
    return tuple(path for path, module in _maps(model) if _behind(module) is None)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Within this context the maps of `model` are multiplied plainly, in their own dtype; also in threads, in which backward passes run."""
    before = [(forward, forward.exact) for _, module in base_modules(model) if (forward := _behind(module)) is not None]
    for forward, _ in before:
        forward.exact = True
    try:
        yield
    finally:
        for forward, exact in before:
            forward.exact = exact


def _check(model: nn.Module) -> None:
    if any(is_quantized(module) for module in model.modules()):
        raise ConfigError(
            "compute 'int8' is for a base kept in 16 or 32 bits; this one is quantized, and its maps multiply in their own way",
            "take the base that is not quantized, or leave compute as it is",
        )
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise ConfigError("the base is kept in float64, so compute 'int8' would lose what float64 is for", "leave it out")


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of the layers, by path: those whose own ``forward`` is all that reads their weight."""
    try:
        stacks = facts(model).require("stacks")
    except TargetError as error:
        raise ConfigError(f"compute 'int8': {error.message}", "leave it out") from error
    layers = tuple(f"{path}." for stack in stacks.values() for path in stack)
    for path, module in base_modules(model):
        if path.startswith(layers) and is_linear(module) and (type(module) is nn.Linear or is_transposed(module)):
            yield path, module


def _fits(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    return weight is not None and all(size > 0 and size % STEP == 0 for size in weight.shape)


def _behind(module: nn.Module) -> _Int8 | None:
    """The 8-bit forward of a map, also where a side path answers in its place."""
    found = vars(module).get(_MARK)
    return found if isinstance(found, _Int8) else None


def _try_out(module: nn.Module) -> None:
    weight: Any = module._parameters["weight"]
    try:
        with torch.no_grad():
            module(weight.new_ones(1, weight.shape[0 if is_transposed(module) else 1]))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(f"compute 'int8': {weight.device} has no product of 8-bit matrices here ({reason})", "leave it out") from error


# ---------------------------------------------------------------- one map


_MARK = "_byway_int8"
"""Where a map keeps its 8-bit forward: its ``forward`` may be covered by a trained copy's."""


class _Int8(NewTensor):
    """An instance ``forward`` of a linear map; an object, since a bound method would not survive pickling."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.transposed = is_transposed(module)
        self.exact = False
        self.native = True
        self._made: tuple[Any, Tensor, Tensor, Tensor] | None = None
        vars(module)[_MARK] = self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}  # a copy's weight is another tensor

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """q(W) (o, i), t (o,) and H's block (k, k); made anew when the weight has been written to, cast or moved."""
        weight: Any = self.module._parameters["weight"]
        if self._made is not None and torch.compiler.is_compiling():
            return self._made[1:]
        state = (weight.data_ptr(), weight.dtype, weight.device, 0 if weight.is_inference() else weight._version)
        if self._made is None or self._made[0] != state:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                matrix = weight.T if self.transposed else weight
                block = hadamard(matrix.shape[1], matrix.device)
                self.native = multiplies_int8(matrix.device.type)  # asked here, since it cannot be asked in compiled code
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
    """x (n, i) → y (n, o) in the dtype of x. Only x has a gradient; kept for it is W, which is there anyway, and nothing of x."""

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
        with torch.autocast(x.device.type, enabled=False):  # its 16 bits hold neither the turned rows nor whole numbers
            for start in range(0, x.shape[0], rows):
                own, step = quantized(rotated(x[start : start + rows], block))
                part = multiplied(own, codes, native=native).float().mul_(step).mul_(scale)
                out[start : start + rows] = part if bias is None else part.add_(bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        weight = weight.to(gradient.dtype)  # nothing is done where they agree, as they do but under autocast
        return gradient @ (weight.T if ctx.transposed else weight), *(None,) * 7


# ---------------------------------------------------------------- how far off it is


@dataclass(frozen=True)
class Error:
    """What 8-bit products change on one batch, beside the plain ones."""

    plain: float
    """The mean loss, multiplied plainly."""
    loss: float
    """(loss − plain) / plain."""
    gradients: float
    """‖g − g₀‖ / ‖g₀‖ over all that is trained."""

    def __str__(self) -> str:
        return f"loss {self.loss:+.2%}, gradients {self.gradients:.1%} off on the probe"


def measure(model: nn.Module, batch: Mapping[str, Any], loss: Loss) -> Error:
    """How far loss and gradients are off on `batch`, in evaluation mode.

    Raises:
        ConfigError: the loss is off by more than a tenth, or is no number: this base cannot be multiplied in 8 bits.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        own, gradients = _loss_and_gradients(model, batch, loss)
        with exact_products(model):
            plain, expected = _loss_and_gradients(model, batch, loss)
    finally:
        for module, training in modes:
            module.training = training
    size = _norm(expected)
    apart = _norm([a.double() - b.double() for a, b in zip(gradients, expected, strict=True)])
    error = Error(plain, (own - plain) / max(abs(plain), 1e-12), apart / size if size > 0 else apart)
    # written so that a loss that is no number is refused as well
    if not abs(own - plain) <= _LARGEST_ERROR * max(abs(plain), _SMALL_LOSS):
        raise ConfigError(
            f"base.compute is int8, but its loss is {own:.4g} on the first rows, where the plain products give {plain:.4g}: "
            "this base has activations that 8 bits for each token do not hold",
            "set base.compute: auto",
        )
    return error


def described(error: Error, model: nn.Module, *, slow: bool) -> str:
    """A few words for the plan; `slow`: this processor has no instructions for it."""
    plain = uncovered(model)
    parts = [f"int8 products: approximate ({error}"]
    if plain:
        parts.append(f"{len(plain)} of {len(list(_maps(model)))} maps plain, their sizes are no multiples of {STEP}: {listed(plain, 3)}")
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
