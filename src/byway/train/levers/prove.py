"""Test each lever on a probe batch: what does not reproduce the plain loss is switched off, and the plan line says so.

The plain computation is padded, with all logits and the whole graph. A lever is compared with it by the task's own loss
and by the gradients of the adapters, on the user's own model and data, in evaluation mode and in training mode, where
dropout and jitter draw the same numbers on both sides (:mod:`byway.engine.fixed_draws`). All levers are tested
together, as they will run. If that does not give the plain result, they are tested one after the other, each with those
that have passed, so that the one at fault is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.modes import evaluating, modes_restored
from byway.core.slots import side_paths
from byway.core.weights import widened
from byway.engine.backward.frontier import frontier_layers, modules_below
from byway.engine.fixed_draws import FixedDraws
from byway.engine.loss.tokens import token_loss
from byway.errors import BywayError, ConfigError
from byway.train import randomness
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Lever, Loss, Measured, Wish
from byway.train.mode import training_mode

__all__ = [
    "OF_GRADIENTS", "TOLERANCE", "Plain", "apart", "at_work", "measured", "plainly", "prove", "refuse", "repeats", "reproduces",
    "resting",
]  # fmt: skip

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of the loss, by the base's dtype: the order of summation differs, nothing else does."""
OF_GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""The same for gradients: that of the plain softmax over 50,000 classes is itself 1e-4 off in float32."""

_STIRRED = 0.02
"""Standard deviation of the values that replace zeros while levers are tested."""

Batch = Mapping[str, object]
Plain = Mapping[str, Measured]
"""Mode → the plain computation in it."""


def plainly(model: nn.Module, padded: Batch, *, loss: Loss = token_loss) -> Plain:
    """Return the plain computation of `padded` in each mode: no lever, all logits, the whole graph."""
    found: dict[str, Measured] = {}
    for mode, within in _modes().items():
        with within(model), stirred(model):
            found[mode] = measured(model, loss, padded, labels_only=False)
    return found


def prove(
    model: nn.Module,
    levers: Sequence[Lever],
    batch: Callable[[Engaged], Batch],
    wishes: Mapping[str, Wish],
    *,
    plain: Plain,
    loss: Loss = token_loss,
    cannot: Mapping[str, str] | None = None,
) -> Engaged:
    """Test `levers` against the plain computation: together, and if that fails one by one.

    Args:
        levers: in the order in which they are tested alone.
        batch: the probe as one forward pass takes it with these levers on.
        wishes: key → auto, on or off.
        plain: :func:`plainly` of the probe.
        cannot: key → why a lever does not apply here, so that it is not tested.

    Raises:
        ConfigError: a lever that is ``on`` does not apply, or does not reproduce the plain loss.
    """
    standing, tried = Engaged(), list[Lever]()
    for lever in levers:
        reason = "switched off" if wishes.get(lever.key) == "off" else (cannot or {}).get(lever.key, "")
        if reason:
            standing = refuse(standing, lever.key, wishes.get(lever.key, "auto"), reason)
        else:
            tried.append(lever)

    def together(some: Sequence[Lever]) -> Engaged:
        found = standing
        for lever in some:
            found = found.with_lever(lever)
        return found

    def fails(engaged: Engaged) -> str:
        return _difference(model, loss, lambda: batch(engaged), engaged, plain)

    every = together(tried)
    whole = fails(every) if tried else ""
    if not whole:
        standing, tried = every, []
    for lever in tried:
        one_more = together([lever])
        reason = whole if one_more.levers == every.levers else fails(one_more)
        standing = refuse(standing, lever.key, wishes.get(lever.key, "auto"), reason) if reason else one_more
    for lever in standing.levers:
        if remark := lever.line(model):
            standing = standing.with_lever(lever, remark)
    return standing


def refuse(engaged: Engaged, key: str, wish: Wish, reason: str) -> Engaged:
    """Return `engaged` with the lever of that key off for `reason`.

    Raises:
        ConfigError: the recipe says that it must be on.
    """
    if wish == "on":
        raise ConfigError(f"engine.{key} is on, but {reason}", f"set engine.{key}: auto or off")
    return engaged.without(key, reason)


def reproduces(model: nn.Module, batch: Batch, engaged: Engaged, *, plain: Plain, loss: Loss = token_loss) -> str:
    """Return why `batch` with `engaged`'s levers does not give the loss and gradients of `plain`; ``""`` if it does."""
    return _difference(model, loss, lambda: batch, engaged, plain)


def repeats(model: nn.Module, batch: Batch, engaged: Engaged, lever: Lever, *, loss: Loss = token_loss) -> str:
    """Return why a step with `lever` is not the step without it; ``""`` if it is.

    For a lever that leaves the batch and what is drawn as they are, but draws again in the backward pass, where draws
    cannot be fixed: both steps start from the same state of the random generators.
    """
    with modes_restored(model), stirred(model):
        training_mode(model)
        with randomness.preserved(), engaged.engaged(model):
            plain = measured(model, loss, batch, labels_only=engaged.labels_only)
        with randomness.preserved():
            return _compared(model, loss, lambda: batch, engaged.with_lever(lever), plain, "training")


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode and all-zero trainable tensors hold small values."""
    with evaluating(model), stirred(model):
        yield


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Within this context all-zero trainable tensors hold small values, the same each time.

    An adapter that has not been trained yet is often zero in one factor, so that the other has no gradient: an error in
    that gradient would go unseen.
    """
    zero = [p for p in _trained(model).values() if p.numel() and not p.any()]
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


@contextmanager
def at_work(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in training mode, as in a step, and what it draws is fixed.

    Below the frontier it is in evaluation mode, whether or not that lever is on: a run without it drops there.
    Attention probabilities are not dropped: which numbers they would draw depends on the batch's layout.
    """
    with modes_restored(model), FixedDraws():
        training_mode(model)
        attention = [model.get_submodule(path) for path in facts(model).attention_modules]
        for module in (*modules_below(model, frontier_layers(model)), *attention):
            module.training = False
        yield


def _modes() -> Mapping[str, Callable[[nn.Module], AbstractContextManager[None]]]:
    """The modes to compare in: for an evaluation, which has no gradients, only its own."""
    return {"evaluation": evaluating, "training": at_work} if torch.is_grad_enabled() else {"evaluation": evaluating}


def _difference(model: nn.Module, loss: Loss, batch: Callable[[], Batch], engaged: Engaged, plain: Plain) -> str:
    """Return why the levers do not give the plain result in each mode, or ``""``."""
    for mode, within in _modes().items():
        with within(model), stirred(model):
            why = _compared(model, loss, batch, engaged.trial(), plain[mode], mode)
        if why:
            return why
    return ""


def _compared(model: nn.Module, loss: Loss, batch: Callable[[], Batch], engaged: Engaged, plain: Measured, mode: str) -> str:
    """Return why the levers do not give `plain`, or ``""``."""
    kept = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = torch.float32 if widened(model) else kept
    try:
        given = batch()
        with engaged.engaged(model):
            own = measured(model, loss, given, labels_only=engaged.labels_only)
    except BywayError as error:
        return error.message
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        # the plain computation has just run: what fails is the lever, on a model built differently from what it assumes
        return f"the model does not run with it ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"
    off, gradient = apart(own, plain)
    if off <= TOLERANCE[dtype] and gradient <= OF_GRADIENTS[dtype]:
        return ""
    return f"it does not reproduce the plain loss here (in {mode} mode, loss off by {off:.1e}, gradients by {gradient:.1e})"


def apart(own: Measured, plain: Measured) -> tuple[float, float]:
    """Return the relative differences of the loss and of the gradients."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return float(sum((float(t.double().pow(2).sum()) for t in tensors), 0.0) ** 0.5)

    off = abs(own.loss - plain.loss) / max(abs(plain.loss), 1e-12)
    whole = norm(plain.gradients.values())
    gradient = norm(own.gradients[k].double() - g.double() for k, g in plain.gradients.items())
    return off, gradient / whole if whole > 0 else gradient


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors of all side paths, by path, adapter and name."""
    return {
        f"{site.path}.{name}.{key}": p for site, name, side in side_paths(model) for key, p in side.named_parameters() if p.requires_grad
    }


def measured(model: nn.Module, loss: Loss, batch: Batch, *, labels_only: bool) -> Measured:
    """Return the mean loss of `batch` and, unless gradients are disabled, those of the trainable tensors."""
    trained = _trained(model)
    total, count = loss(model, batch, labels_only=labels_only)
    if not torch.is_grad_enabled():  # an evaluation: only the loss has to agree
        return Measured(float(total) / max(count, 1), {})
    gradients = torch.autograd.grad(total / max(count, 1), list(trained.values()), allow_unused=True)
    found = {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(trained.items(), gradients, strict=True)}
    return Measured(float(total.detach()) / max(count, 1), found)
