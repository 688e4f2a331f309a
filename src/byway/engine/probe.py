"""Every lever proves itself on a probe batch before it is used: what does not reproduce the plain loss is switched off, visibly.

The plain computation is padded, with all logits and the whole graph. A lever is compared with it by the loss and by the gradients of the
adapters, on the user's own model and data, in evaluation mode (no dropout), so that the two are the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byway.core import side_paths
from byway.engine.attention import packing
from byway.engine.frontier import frontier
from byway.engine.loss import token_loss
from byway.errors import BywayError, ConfigError

__all__ = ["Levers", "prove"]

Wish = Literal["auto", "on", "off"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of loss and gradients by the base's dtype: the order of summation differs, nothing else does."""


@dataclass(frozen=True)
class Levers:
    """Which savings are on; `reasons` says why one is off."""

    pack: bool = False
    labels_only: bool = False
    frontier: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the plan: ``pack on, labels_only off (…)``."""
        states = {"pack": self.pack, "labels_only": self.labels_only, "frontier": self.frontier}
        return ", ".join(f"{name} on" if on else f"{name} off ({self.reasons.get(name, 'not asked for')})" for name, on in states.items())


def prove(model: nn.Module, padded: Mapping[str, Any], packed: Mapping[str, Any] | None, wishes: Mapping[str, Wish]) -> Levers:
    """Try each lever that `wishes` (``pack``, ``labels_only``, ``frontier`` → auto, on, off) allows, against the plain computation.

    Args:
        padded: a small batch of examples, padded.
        packed: the same examples packed, or None if they cannot be.

    Raises:
        ConfigError: a lever that is ``on`` does not reproduce the plain loss.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain = _measure(model, padded, labels_only=False, use_frontier=False)
        batches = {"pack": packed, "labels_only": padded, "frontier": padded}
        reasons: dict[str, str] = {}
        for lever, batch in batches.items():
            if wishes.get(lever, "auto") == "off":
                reasons[lever] = "switched off"
                continue
            reason = _difference(model, lever, batch, plain)
            if reason and wishes.get(lever) == "on":
                raise ConfigError(f"engine.{lever} is on, but {reason}", f"set engine.{lever}: auto or off")
            if reason:
                reasons[lever] = reason
    finally:
        for module, training in modes:
            module.training = training
    return Levers(**{lever: lever not in reasons for lever in batches}, reasons=reasons)


@dataclass(frozen=True)
class _Measured:
    loss: float
    gradients: dict[str, Tensor]


def _difference(model: nn.Module, lever: str, batch: Mapping[str, Any] | None, plain: _Measured) -> str:
    """Why `lever` does not stand, or ``""``."""
    if batch is None:
        return "these examples cannot be packed"
    try:
        own = _measure(model, batch, labels_only=lever == "labels_only", use_frontier=lever == "frontier")
    except BywayError as error:
        return error.message
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    tolerance = _TOLERANCE[dtype]
    loss = abs(own.loss - plain.loss) / max(abs(plain.loss), 1e-12)
    whole = torch.sqrt(sum((g.double().pow(2).sum() for g in plain.gradients.values()), torch.zeros((), dtype=torch.float64)))
    apart = torch.sqrt(
        sum(
            ((own.gradients[k].double() - g.double()).pow(2).sum() for k, g in plain.gradients.items()),
            torch.zeros((), dtype=torch.float64),
        )
    )
    gradient = float(apart / whole) if whole > 0 else float(apart)
    if loss > tolerance or gradient > tolerance:
        return f"it does not reproduce the plain loss here (loss off by {loss:.1e}, gradients by {gradient:.1e})"
    return ""


def _measure(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool, use_frontier: bool) -> _Measured:
    trained = {
        f"{site.path}.{name}.{key}": p for site, name, side in side_paths(model) for key, p in side.named_parameters() if p.requires_grad
    }
    with ExitStack() as stack:
        if "cu_seq_lens_q" in batch:
            stack.enter_context(packing(model))
        if use_frontier:
            stack.enter_context(frontier(model))
        total, count = token_loss(model, batch, labels_only=labels_only)
        gradients = torch.autograd.grad(total / max(count, 1), list(trained.values()), allow_unused=True)
    found = {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(trained.items(), gradients, strict=True)}
    return _Measured(float(total.detach()) / max(count, 1), found)
