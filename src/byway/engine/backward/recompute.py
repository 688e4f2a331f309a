"""Cheap activations (norms, activation functions, products of two kept tensors) are recomputed instead of kept.

With a frozen base, most of what autograd keeps are inputs of side paths: the output of a norm, or ``silu(gate)·up``.
Each is a few operations away from tensors that are kept anyway. Within :func:`recomputed` autograd keeps how to
recompute such a tensor instead of the tensor. The same operations on the same inputs give the same bits, so the loss is
that of the plain computation; gradients differ only by the order in which the contributions to a norm's input are
summed. Unlike gradient checkpointing, no matrix product is repeated.

Tensors that are changed in place: autograd does not compare versions of what saved-tensor hooks return, so it is done
here. How to recompute a tensor counts for one version of it: after ``h = norm(x); h += 1`` the tensor itself is kept.
What is kept and has changed when the backward pass reads it raises autograd's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from byway.core.slots import base_modules, slot_of

__all__ = ["SMALLEST", "again", "dropped", "recomputed"]

SMALLEST = 1 << 14
"""Elements: smaller tensors are kept, because recomputing one costs some microseconds."""

_KEEP_INPUT = frozenset(f"{name}Backward0" for name in ("Silu", "Gelu", "NativeLayerNorm", "Hardswish", "Mish", "Softplus", "LeakyRelu"))
"""Autograd operations that keep their input, from which their output can be recomputed."""
_KEEP_OUTPUT = frozenset(f"{name}Backward0" for name in ("Relu", "Sigmoid", "Tanh"))
"""Autograd operations that keep their output, so that recomputing it saves nothing."""
_TAG = "_byway_again"
_PLAIN = "plain"
"""In place of an operation's name: a module that draws, changes its input, or returns a view of it is left alone."""


class _Again:
    """Recomputes a tensor once for all graph nodes that keep it; freed with the last of them."""

    __slots__ = ("__weakref__", "compute", "result")

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self.result: Tensor | None = None

    def get(self) -> Tensor:
        if self.result is None:
            with torch.no_grad():
                self.result = self.compute()
        return self.result


class _Viewed(NamedTuple):
    """What autograd keeps instead of a tensor: how to recompute it, and its shape."""

    again: _Again
    shape: torch.Size


class _Kept(NamedTuple):
    """A tensor that is kept, and its version then."""

    tensor: Tensor
    version: int


def again(out: Tensor, compute: Callable[[], Tensor]) -> None:
    """Register how to recompute `out`, bit for bit, from kept tensors. No effect outside :func:`recomputed`."""
    vars(out)[_TAG] = out._version, _Again(compute)


def dropped(dropout: nn.Dropout, x: Tensor) -> Tensor:
    """Return dropout(x), recomputed from x and the mask, so that side paths with the same x keep it once."""
    out = dropout(x)
    # without a mask (in evaluation, p = 0) it returns x itself, whose own node may be a product or another dropout
    fresh = type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p < 1 and not dropout.inplace
    node: Any = out.grad_fn
    if not fresh or node is None or torch.compiler.is_compiling() or x.grad_fn is None:
        return out
    kept = _pack(x, 0)
    if node.name() == "NativeDropoutBackward0":
        again(out, lambda: _unpack(kept) * node._saved_result1 * (1.0 / (1.0 - dropout.p)))
    elif node.name() == "MulBackward0":  # on a CPU the mask is already divided by 1 − p
        again(out, lambda: _unpack(kept) * node._saved_other)
    return out


@contextmanager
def recomputed(model: nn.Module, smallest: int = SMALLEST) -> Iterator[int]:
    """Recompute frozen norms and activation functions in the backward pass; yields the number of modules.

    `smallest`: tensors with fewer elements are kept.
    """
    found = [module for _, module in base_modules(model) if _cheap(module)]
    for module in found:
        module.forward = _Lean(module, smallest)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _pack(tensor, smallest), _unpack):
            yield len(found)
    finally:
        for module in found:
            del module.__dict__["forward"]


def _cheap(module: nn.Module) -> bool:
    """True for a frozen norm or an activation function without submodules, buffers or side path."""
    if module._modules or slot_of(module) is not None or "forward" in vars(module):
        return False
    kind = type(module)
    activation = kind.__module__ in ("transformers.activations", "torch.nn.modules.activation") and not module._parameters
    norm = kind.__name__.endswith(("RMSNorm", "LayerNorm")) and not module._buffers
    return (activation or norm) and not any(p is not None and p.requires_grad for p in module._parameters.values())


class _Lean:
    """The instance ``forward`` of a cheap module."""

    def __init__(self, module: nn.Module, smallest: int) -> None:
        self.module = module
        self.smallest = smallest
        self.plain = type(module).forward
        self.operation: str | None = None
        """Autograd's name of its only operation; ``""`` if there are several; None before the first call."""

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        if rest or options or not x.requires_grad or not torch.is_grad_enabled() or x.numel() < self.smallest:
            return self.plain(self.module, x, *rest, **options)
        if self.operation is None:
            self.operation = self._single(x)
        if self.operation in _KEEP_OUTPUT or self.operation == _PLAIN:
            return self.plain(self.module, x)
        out = self.plain(self.module, x) if self.operation in _KEEP_INPUT else _InputOnly.apply(self, x)
        if isinstance(out, Tensor) and out is not x:
            kept = _kept(x)
            again(out, lambda: self.plain(self.module, _unpack(kept)))
        return out

    def _single(self, x: Tensor) -> str:
        # use separate saved-tensor hooks so that an enclosing checkpoint ignores this pass
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor), _draws(x.device) as drawn:
            x = x.detach()[:1].clone().requires_grad_().clone()  # unlike a leaf, it may be changed in place
            before = x.grad_fn
            out = self.plain(self.module, x)
        if drawn() or x._version or (isinstance(out, Tensor) and (out is x or out._is_view())):
            return _PLAIN
        node = out.grad_fn if isinstance(out, Tensor) else None
        return node.name() if node is not None and node.next_functions[0][0] is before else ""


@contextmanager
def _draws(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Draws within this context leave no trace; yields whether there were any, to be called afterwards."""
    found = False
    cuda = [device] if device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in cuda)]

    with torch.random.fork_rng(devices=cuda):
        before = states()
        yield lambda: found
        found = any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))


class _InputOnly(torch.autograd.Function):
    """f(x) of several operations; keeps x only, and runs f again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, lean: _Lean, x: Tensor) -> Tensor:
        ctx.lean = lean
        ctx.save_for_backward(x)
        return lean.plain(lean.module, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.lean.plain(ctx.lean.module, x)
        return None, torch.autograd.grad(out, x, gradients[0])[0]


def _kept(tensor: Tensor) -> _Kept:
    # detached: a tensor kept by its own graph would never be freed
    return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)


def _pack(tensor: Tensor, smallest: int) -> _Kept | _Viewed:
    if tensor.grad_fn is None:
        return _kept(tensor)
    whole = tensor._base if tensor._is_view() else tensor
    if whole is None or whole.numel() != tensor.numel() or not (whole.is_contiguous() and tensor.is_contiguous()):
        return _kept(tensor)
    if tensor.numel() < smallest:
        return _kept(tensor)
    version, recipe = vars(whole).get(_TAG, (None, None))
    if version != whole._version:
        recipe = _product(whole)
        vars(whole)[_TAG] = whole._version, recipe
    return _Viewed(recipe, tensor.shape) if recipe is not None else _kept(tensor)


def _product(tensor: Tensor) -> _Again | None:
    """Return how to recompute a product whose two factors autograd keeps anyway; None for any other tensor."""
    node: Any = tensor.grad_fn
    if node is None or node.name() != "MulBackward0" or None in (way for way, _ in node.next_functions):
        return None  # a factor is kept only if the other one has a gradient
    return _Again(lambda: node._saved_self * node._saved_other)


def _unpack(kept: _Kept | _Viewed) -> Tensor:
    if isinstance(kept, _Viewed):
        return kept.again.get().view(kept.shape)
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead"
        )
    return tensor
