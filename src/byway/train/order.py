"""Assign rows to steps: known before the first step, and a function of seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from byway.data.batches import Step, plan_epoch
from byway.errors import DataError

if TYPE_CHECKING:
    from byway.engine.shared_prefix import Sharing
    from byway.recipe.sections import Train

__all__ = ["Order"]


class Order:
    """The steps of a run. ``total``: number of optimizer updates; ``micro_tokens``: maximum tokens of one forward pass.

    `sharing`: prefixes that rows share are computed once; rows that share one go together, so more fit into a pass.
    """

    def __init__(self, lengths: Sequence[int], train: Train, *, micro_tokens: int, pack: bool, sharing: Sharing | None = None) -> None:
        self.lengths = list(lengths)
        self.train = train
        self.micro_tokens = micro_tokens
        self.pack = pack
        self.sharing = sharing
        self._epoch, self._plan = -1, list[Step]()
        whole = int(train.epochs)
        if train.max_steps is not None:
            self.total = train.max_steps
        else:
            part = round((train.epochs - whole) * len(self.epoch(whole)), 6) if train.epochs > whole else 0
            self.total = self.steps_before(whole) + math.ceil(part)
        if not self.total:
            raise DataError("0 optimizer steps", "raise train.epochs or train.max_steps")

    def epoch(self, epoch: int) -> list[Step]:
        """Return the steps of one epoch (from 0); the last result is kept."""
        if epoch != self._epoch:
            self._plan = plan_epoch(
                self.lengths,
                epoch=epoch,
                seed=self.train.seed,
                tokens_per_step=self.train.tokens_per_step,
                rows_per_step=self.train.rows_per_step,
                micro_tokens=self.micro_tokens,
                pack=self.pack,
                rearrange=None if self.sharing is None else self.sharing.rearranged,
            )
            self._epoch = epoch
        return self._plan

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps of all epochs before `epoch`."""
        if self.train.rows_per_step is not None:
            return epoch * len(self.epoch(0))
        return sum(len(self.epoch(e)) for e in range(epoch))

    def next(self, epoch: int, position: int) -> tuple[int, int, Step]:
        """Return (epoch, position, step) of the step that follows `position` steps of `epoch`."""
        if position >= len(self.epoch(epoch)):
            epoch, position = epoch + 1, 0
        return epoch, position, self.epoch(epoch)[position]

    def ends_epoch(self, epoch: int, position: int) -> bool:
        """True if `epoch` ends after `position` steps."""
        return position >= len(self.epoch(epoch))
