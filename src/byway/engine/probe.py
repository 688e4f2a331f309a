"""Every lever proves itself on a probe batch before it is used: what does not reproduce the plain loss is switched off, visibly.

The plain computation is padded, with all logits and the whole graph. A lever is compared with it by the task's own loss and by the
gradients of the adapters, on the user's own model and data, in evaluation mode (no dropout), so that the two are the same function. Each
is tried together with those that already stand, as they will run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from byway.core import side_paths
from byway.engine.attention import packing
from byway.engine.compute import widened
from byway.engine.frontier import frontier
from byway.engine.loss import token_loss, unchunked
from byway.engine.recompute import recomputed
from byway.errors import BywayError, ConfigError

__all__ = ["Levers", "Loss", "prove", "reproduces"]

Wish = Literal["auto", "on", "off"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of the loss by the base's dtype: the order of summation differs, nothing else does."""
_OF_GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""The same of gradients: that of the plain softmax over 50,000 classes is itself 1e-4 off in float32."""

_LEVERS = ("pack", "labels_only", "frontier", "recompute")
"""In the order in which they are tried."""


class Loss(Protocol):
    """A task's loss: the SUM over the labels of a batch, and their number; ``labels_only`` is for language models."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Levers:
    """Which savings are on; `reasons` says why one is off, or what it does not do although it is on."""

    pack: bool = False
    labels_only: bool = False
    frontier: bool = False
    recompute: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the plan: ``pack on, labels_only off (…)``."""
        states = {"pack": self.pack, "labels_only": self.labels_only, "frontier": self.frontier, "recompute": self.recompute}
        why = {name: f" ({self.reasons[name]})" if name in self.reasons else "" for name in states}
        return ", ".join(f"{name} on{why[name]}" if on else f"{name} off{why[name] or ' (not asked for)'}" for name, on in states.items())


def prove(
    model: nn.Module,
    padded: Mapping[str, Any],
    packed: Mapping[str, Any] | None,
    wishes: Mapping[str, Wish],
    *,
    loss: Loss = token_loss,
    cannot: Mapping[str, str] | None = None,
) -> Levers:
    """Try each lever that `wishes` (lever → auto, on, off) allows, against the plain computation.

    Args:
        padded: a small batch of examples, padded.
        packed: the same examples packed, or None if they cannot be.
        cannot: lever → why it does not apply here, so that it is not even tried.

    Raises:
        ConfigError: a lever that is ``on`` does not apply, or does not reproduce the plain loss.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    reasons: dict[str, str] = {}
    standing = Levers()
    try:
        plain = _measure(model, loss, padded, standing)
        for lever in _LEVERS:
            wish, tried = wishes.get(lever, "auto"), replace(standing, **{lever: True})
            reason = "switched off" if wish == "off" else (cannot or {}).get(lever, "")
            if not reason:
                reason = _difference(model, loss, packed if tried.pack else padded, tried, plain)
            if reason and wish == "on":
                raise ConfigError(f"engine.{lever} is on, but {reason}", f"set engine.{lever}: auto or off")
            if reason:
                reasons[lever] = reason
            else:
                standing = tried
    finally:
        for module, training in modes:
            module.training = training
    if standing.labels_only and (whole := unchunked(model)):
        reasons["labels_only"] = f"unchunked: {whole}"
    return replace(standing, reasons=reasons)


def reproduces(model: nn.Module, padded: Mapping[str, Any], packed: Mapping[str, Any], levers: Levers, *, loss: Loss = token_loss) -> str:
    """Why `packed`, with `levers`, does not give the loss and the gradients of `padded`, computed plainly; ``""`` if it does."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _difference(model, loss, packed, levers, _measure(model, loss, padded, Levers()))
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class _Measured:
    loss: float
    gradients: dict[str, Tensor]


def _difference(model: nn.Module, loss: Loss, batch: Mapping[str, Any] | None, levers: Levers, plain: _Measured) -> str:
    """Why the last of `levers` does not stand, or ``""``."""
    if batch is None:
        return "these examples cannot be packed"
    try:
        own = _measure(model, loss, batch, levers)
    except BywayError as error:
        return error.message
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        # the plain computation has just run: what fails is the lever, on a model that is built otherwise than it takes for granted
        return f"the model does not run with it ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"
    kept = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = torch.float32 if widened(model) else kept
    off = abs(own.loss - plain.loss) / max(abs(plain.loss), 1e-12)
    whole = _norm(plain.gradients.values())
    apart = _norm(own.gradients[k].double() - g.double() for k, g in plain.gradients.items())
    gradient = apart / whole if whole > 0 else apart
    if off <= _TOLERANCE[dtype] and gradient <= _OF_GRADIENTS[dtype]:
        return ""
    return f"it does not reproduce the plain loss here (loss off by {off:.1e}, gradients by {gradient:.1e})"


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum((float(t.double().pow(2).sum()) for t in tensors), 0.0) ** 0.5)


def _measure(model: nn.Module, loss: Loss, batch: Mapping[str, Any], levers: Levers) -> _Measured:
    trained = {
        f"{site.path}.{name}.{key}": p for site, name, side in side_paths(model) for key, p in side.named_parameters() if p.requires_grad
    }
    with ExitStack() as stack:
        if levers.pack:
            stack.enter_context(packing(model))
        if levers.frontier:
            stack.enter_context(frontier(model))
        if levers.recompute:
            stack.enter_context(recomputed(model, smallest=1))
        total, count = loss(model, batch, labels_only=levers.labels_only)
        gradients = torch.autograd.grad(total / max(count, 1), list(trained.values()), allow_unused=True)
    found = {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(trained.items(), gradients, strict=True)}
    return _Measured(float(total.detach()) / max(count, 1), found)
