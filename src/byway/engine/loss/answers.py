"""Where the answers of a batch begin: the labels, for side paths that stand between a text and what is to be predicted.

A loss that takes the labels away before it calls the model puts them here; a model called with ``labels=`` puts them here itself.
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
    """Whether a context put it here, which also takes it away; else one forward did, which may have failed halfway."""
    below: _Entry | None


_TOP: ContextVar[_Entry | None] = ContextVar("byway_answers", default=None)


@contextmanager
def answers(labels: Tensor) -> Iterator[None]:
    """Within this context the model is called on a batch with these labels (b, t), unshifted, -100 where nothing is predicted."""
    token = _TOP.set(_Entry(labels, True, _TOP.get()))
    try:
        yield
    finally:
        _TOP.reset(token)


def push(labels: Tensor | None) -> None:
    """At the start of a model's forward: its own labels, if it was given any; what a failed forward left behind is dropped."""
    pop()
    if labels is not None:
        _TOP.set(_Entry(labels, False, _TOP.get()))


def pop() -> None:
    """At the end of a model's forward."""
    top = _TOP.get()
    while top is not None and not top.scoped:
        top = top.below
    _TOP.set(top)


def labels_here() -> Tensor | None:
    """The labels of the batch that is computed now, or None."""
    top = _TOP.get()
    return None if top is None else top.labels
