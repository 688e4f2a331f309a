"""The labels of the current batch, for side paths that insert virtual tokens between a text and its answer.

A loss that removes the labels before it calls the model publishes them here, as does a model called with ``labels=``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

__all__ = ["answers", "labels_here", "pop", "push"]


@dataclass(frozen=True)
class _Entry:
    labels: Tensor
    scoped: bool
    """True if a context published it and will remove it; False if a forward pass did, which may have failed halfway."""
    below: _Entry | None


_TOP: ContextVar[_Entry | None] = ContextVar("byway_answers", default=None)


@contextmanager
def answers(labels: Tensor) -> Iterator[None]:
    """Publish the labels (b, t) of the current batch: unshifted, -100 for tokens not in the loss."""
    token = _TOP.set(_Entry(labels, True, _TOP.get()))
    try:
        yield
    finally:
        _TOP.reset(token)


def push(labels: Tensor | None) -> None:
    """Publish the labels given to a model's forward pass, and drop those left by a failed one."""
    pop()
    if labels is not None:
        _TOP.set(_Entry(labels, False, _TOP.get()))


def pop() -> None:
    """Remove what :func:`push` published, at the end of the forward pass."""
    top = _TOP.get()
    while top is not None and not top.scoped:
        top = top.below
    _TOP.set(top)


def labels_here() -> Tensor | None:
    """Return the labels of the current batch; None if none are published."""
    top = _TOP.get()
    return None if top is None else top.labels
