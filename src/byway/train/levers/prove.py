"""Every lever proves itself on a probe batch before it is used: what does not reproduce the plain loss is switched off, visibly.

The plain computation is padded, with all logits and the whole graph. A lever is compared with it by the task's own loss and by the
gradients of the adapters, on the user's own model and data, in evaluation mode (no dropout), so that the two are the same function. All
are tried together, as they will run; if that is not the plain computation, one after the other, each with those that already stand, so that
it is known which one fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import side_paths
from byway.core.weights import widened
from byway.engine.attention.packing import packing
from byway.engine.backward.frontier import frontier
from byway.engine.backward.recompute import recomputed
from byway.engine.loss.tokens import token_loss, unchunked
from byway.errors import BywayError, ConfigError
from byway.train.levers.lever import Levers, Loss, Measured, Wish

__all__ = ["plainly", "prove", "reproduces", "resting"]


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of the loss by the base's dtype: the order of summation differs, nothing else does."""
_OF_GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""The same of gradients: that of the plain softmax over 50,000 classes is itself 1e-4 off in float32."""

_STIRRED = 0.02
"""Standard deviation of the numbers that stand for zeros while levers are proved."""

_LEVERS = ("pack", "labels_only", "frontier", "recompute")
"""In the order in which they are tried where they have to be tried alone."""


def plainly(model: nn.Module, padded: Mapping[str, Any], *, loss: Loss = token_loss) -> Measured:
    """The plain computation of `padded`, in evaluation mode: no lever, all logits, the whole graph."""
    with resting(model):
        return _measure(model, loss, padded, Levers())


def prove(
    model: nn.Module,
    padded: Mapping[str, Any],
    packed: Mapping[str, Any] | None,
    wishes: Mapping[str, Wish],
    *,
    loss: Loss = token_loss,
    cannot: Mapping[str, str] | None = None,
    plain: Measured | None = None,
) -> Levers:
    """Try the levers that `wishes` (lever → auto, on, off) allows against the plain computation: together, and if that fails one by one.

    Args:
        padded: a small batch of examples, padded.
        packed: the same examples packed, or None if they cannot be.
        cannot: lever → why it does not apply here, so that it is not even tried.
        plain: :func:`plainly` of `padded`, where it is already known.

    Raises:
        ConfigError: a lever that is ``on`` does not apply, or does not reproduce the plain loss.
    """
    reasons: dict[str, str] = {}

    def refuse(lever: str, reason: str) -> None:
        if wishes.get(lever) == "on":
            raise ConfigError(f"engine.{lever} is on, but {reason}", f"set engine.{lever}: auto or off")
        reasons[lever] = reason

    own = dict(cannot or {})
    if packed is None:
        own.setdefault("pack", "these examples cannot be packed")
    tried: list[str] = []
    for lever in _LEVERS:
        reason = "switched off" if wishes.get(lever) == "off" else own.get(lever, "")
        if reason:
            refuse(lever, reason)
        else:
            tried.append(lever)
    standing = Levers()
    with resting(model):
        known = _measure(model, loss, padded, standing) if plain is None else plain

        def fails(levers: Levers) -> str:
            return _difference(model, loss, packed if levers.pack and packed is not None else padded, levers, known)

        together = replace(standing, **dict.fromkeys(tried, True))
        whole = fails(together) if tried else ""
        if not whole:
            standing, tried = together, []
        for lever in tried:
            reason = whole if (levers := replace(standing, **{lever: True})) == together else fails(levers)
            if reason:
                refuse(lever, reason)
            else:
                standing = levers
    if standing.labels_only and (why := unchunked(model)):
        reasons["labels_only"] = f"unchunked: {why}"
    return replace(standing, reasons=reasons)


def reproduces(
    model: nn.Module,
    padded: Mapping[str, Any],
    packed: Mapping[str, Any],
    levers: Levers,
    *,
    loss: Loss = token_loss,
    plain: Measured | None = None,
) -> str:
    """Why `packed`, with `levers`, does not give the loss and the gradients of `padded`, computed plainly; ``""`` if it does.

    `plain`: :func:`plainly` of `padded`, where it is already known.
    """
    with resting(model):
        return _difference(model, loss, packed, levers, _measure(model, loss, padded, Levers()) if plain is None else plain)


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode, and what is trained and zero is small numbers; afterwards all is as it was.

    An adapter that has not been trained yet is often zero in one factor, so that the other has no gradient: nothing that a lever does to
    that gradient would be seen. Each time the numbers are the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    zero = [p for p in _trained(model).values() if p.numel() and not p.any()]
    model.eval()
    try:
        with torch.no_grad():
            drawn = torch.Generator().manual_seed(0)
            for p in zero:
                p.copy_(_STIRRED * torch.randn(p.shape, generator=drawn))
        yield
    finally:
        with torch.no_grad():
            for p in zero:
                p.zero_()
        for module, training in modes:
            module.training = training


def _difference(model: nn.Module, loss: Loss, batch: Mapping[str, Any], levers: Levers, plain: Measured) -> str:
    """Why `levers` do not give what is plain, or ``""``."""
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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of all side paths, by path, adapter and name."""
    return {
        f"{site.path}.{name}.{key}": p for site, name, side in side_paths(model) for key, p in side.named_parameters() if p.requires_grad
    }


def _measure(model: nn.Module, loss: Loss, batch: Mapping[str, Any], levers: Levers) -> Measured:
    trained = _trained(model)
    with ExitStack() as stack:
        if levers.pack:
            stack.enter_context(packing(model))
        if levers.frontier:
            stack.enter_context(frontier(model))
        if levers.recompute:
            stack.enter_context(recomputed(model, smallest=1))
        total, count = loss(model, batch, labels_only=levers.labels_only)
        if not torch.is_grad_enabled():  # an evaluation: the loss is all that has to agree
            return Measured(float(total) / max(count, 1), {})
        gradients = torch.autograd.grad(total / max(count, 1), list(trained.values()), allow_unused=True)
    found = {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(trained.items(), gradients, strict=True)}
    return Measured(float(total.detach()) / max(count, 1), found)
