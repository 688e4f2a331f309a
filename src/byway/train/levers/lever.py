"""An optimization of a run: one object that says when it applies, what it saves, and how it takes effect.

In the code and in messages an optimization is a *lever*. The files of this folder that define one :class:`Lever` each
are the registry: the probe, the plan line, evaluation and the training loop iterate over the levers and know none of
them by name. A lever of your own is named in a recipe by import path (``engine.levers: ["mypackage.toy:Toy"]``).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from byway.tasks.task import Task

if TYPE_CHECKING:
    from byway.recipe.sections import Engine, Train

__all__ = ["Lever", "Loss", "Measured", "On", "Probe", "Saving", "Setting", "Wish"]

Wish = Literal["auto", "on", "off"]


class Loss(Protocol):
    """A task's loss: the SUM over a batch's labels, and their number; ``labels_only`` is for language models."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Measured:
    """A batch's mean loss over its labels, and the gradients of the trainable tensors (none under ``no_grad``)."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """Pieces of a few of the run's own rows, with the loss and gradients of the plain computation of them."""

    rows: Sequence[Any]
    padded: Mapping[str, Any]
    plain: Mapping[str, Measured]
    """Mode (``evaluation``, ``training``) → the plain computation in it."""
    alike: bool = False
    """True if two of the rows share a prefix, so that prefix sharing can be tested on them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The run that a lever decides for."""

    model: nn.Module
    task: Task[Any]
    examples: Sequence[Any]
    engine: Engine
    train: Train
    probe: Probe
    micro_tokens: int
    """Tokens of one forward pass."""
    tokens: float = 0.0
    """Tokens computed in one epoch; shared prefixes count once. Known once steps are planned."""
    cached: bool = False
    """True if the frozen layers are read from the cache and not run. Known once the cache is planned."""


class On(Protocol):
    """The levers that are on so far."""

    @property
    def packed(self) -> bool:
        """True if rows are packed."""
        ...


@dataclass(frozen=True)
class Saving:
    """A lever as it would run, with what it would save."""

    lever: Lever
    share: float
    """The share of the work saved, 0 to 1."""
    of: str
    """What it is a share of, for messages: ``of the layers' work``."""
    words: str = ""
    """Shown in the plan line when the lever is on."""


class Lever(ABC):
    """One optimization. An instance holds what was decided about it; the class is first called without arguments.

    Before it is used, loss and gradients with it are compared with the plain computation on a probe of the run's rows.
    """

    key: ClassVar[str]
    """Its name in the plan line, and the recipe key ``engine.<key>`` (auto, on or off) of a built-in lever."""
    place: ClassVar[int] = 100
    """Levers act in this order: contexts are entered, batches rewritten and lines printed by it."""
    stage: ClassVar[Literal["first", "packed", "last", "planned"]] = "first"
    """When it is decided: ``first`` with others, all tried at once; ``packed`` after those, one at a time; ``last``
    when steps and the cache are planned; ``planned`` by the memory plan."""
    worth: ClassVar[float] = 0.0
    """``auto`` leaves it off where it saves a smaller share."""

    def wish(self, engine: Engine) -> Wish:
        """The value of ``engine.<key>``; ``auto`` for a lever that is no key of the recipe."""
        return vars(engine).get(self.key, "auto")

    def cannot(self, setting: Setting, on: On) -> str:
        """Return why the lever does not apply to this task, method or data; ``""`` if it can be tried."""
        return ""

    def savings(self, setting: Setting, on: On) -> Iterator[Saving]:
        """Yield the ways to use it, best first; the first that passes :meth:`fails` is taken. Default: itself."""
        yield Saving(self, 1.0, "")

    def fails(self, setting: Setting) -> str:
        """Return why this way to use it is wrong; ``""`` if only loss and gradients are left to compare."""
        return ""

    def trial(self) -> Lever:
        """Return the lever as it is tested on a small probe: thresholds that leave small tensors alone are off."""
        return self

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which it is in effect; afterwards the model is as before."""
        return nullcontext()

    def batch(self, task: Task[Any], examples: Sequence[Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the collated `batch` of `examples`."""
        return batch

    def line(self, model: nn.Module) -> str:
        """Return a remark for the plan line when it is on; ``""`` for none."""
        return ""
