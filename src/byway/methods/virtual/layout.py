"""The columns of a row into which virtual tokens are inserted.

::

    text       pads │ a b c d e │ pads                       t columns
    assembled  pads │ V V a b c W d e │ pads                 n = t + virtual columns

The leading tokens stand before column `first`, the trailing ones before column `second`, chosen per row, so that
padding on either side makes no difference. Everything is computed from the mask and the labels, which are available
both before and after the forward, so no state is kept.

Shapes: b batch (1 if all rows are alike), t columns of text, n assembled columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORED", "Layout", "extended"]

IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """Positions of the virtual tokens in rows of `t` columns."""

    t: int
    first: Tensor
    """(b, 1)"""
    second: Tensor
    """(b, 1), not before `first`."""
    leading: int
    trailing: int
    reads_after: bool = False
    """True if the text's last column is read after the trailing virtual tokens, where the next token is predicted."""

    @classmethod
    def of(
        cls,
        t: int,
        mask: Tensor | None,
        device: torch.device,
        *,
        leading: int,
        trailing: int,
        after_first: bool = False,
        before_last: bool = False,
        labels: Tensor | None = None,
        put_in: int = 0,
    ) -> Layout:
        """Compute the layout from the mask (b, t + put_in), in which `put_in` virtual columns are already inserted.

        Args:
            after_first: the leading tokens follow the first token ([CLS]).
            before_last: the trailing tokens stand before the last token ([SEP]); if False, right after the text.
            labels: (b, t), unshifted; if given, the trailing tokens stand before the first token in the loss.
        """
        start, end = _real(mask, t + put_in, device)
        end = (end - put_in).clamp_min(0)
        first = torch.minimum(start + 1, end).clamp_min(0) if after_first else start
        second = end - 1 if before_last else end
        if labels is not None and trailing:
            columns = torch.arange(t, device=device)[None]
            in_loss = (labels != IGNORED) & (columns > start)
            begins = torch.where(in_loss, columns, t).amin(dim=1, keepdim=True)
            second = torch.minimum(second, begins)
        return cls(t, first, torch.maximum(second, first), leading, trailing, reads_after=not before_last and trailing > 0)

    @property
    def count(self) -> int:
        """Number of virtual columns in a row."""
        return self.leading + self.trailing

    def index(self) -> Tensor:
        """Return (b, n): for each assembled column, its source column in [virtual tokens | text]."""
        columns = torch.arange(self.t + self.count, device=self.first.device)[None]
        behind = columns - self.first
        text = columns - self.leading * (behind >= self.leading).long()
        beyond = columns - self.leading - self.second
        text = text - self.trailing * (beyond >= self.trailing).long()
        source = self.count + text.clamp(0, self.t - 1)
        source = torch.where((behind >= 0) & (behind < self.leading), behind, source)
        return torch.where((beyond >= 0) & (beyond < self.trailing), self.leading + beyond, source)

    def columns(self) -> Tensor:
        """Return (b, t): the assembled column of each text column."""
        text = torch.arange(self.t, device=self.first.device)[None]
        return text + self.leading * (text >= self.first).long() + self.trailing * (text >= self.second).long()

    def read(self) -> Tensor:
        """Return (b, t): the assembled column from which the output of each text column is read."""
        found = self.columns()
        if not self.reads_after:
            return found
        text = torch.arange(self.t, device=self.first.device)[None]
        return torch.where(text == self.second - 1, self.leading + self.second + self.trailing - 1, found)

    def assemble(self, virtual: Tensor, text: Tensor) -> Tensor:
        """Insert the virtual tokens (virtual, d) into the text (b, t, d); return (b, n, d)."""
        source = torch.cat([virtual[None].expand(text.shape[0], -1, -1), text], dim=1)
        index = self.index().expand(text.shape[0], -1)
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))

    def put(self, text: Tensor, value: int) -> Tensor:
        """Return (b, t) as (b, n), with `value` in the virtual columns."""
        source = torch.cat([text.new_full((text.shape[0], self.count), value), text], dim=1)
        return source.gather(1, self.index().expand(text.shape[0], -1))

    def positions(self, text: Tensor) -> Tensor:
        """Return position ids (b, t) as (b, n).

        Text after virtual tokens moves on by their number; they get the positions in between.
        """
        rows = max(text.shape[0], self.first.shape[0])
        text = text.expand(rows, -1)
        first, second = self.first.expand(rows, 1), self.second.expand(rows, 1)
        columns = torch.arange(self.t, device=text.device)[None]
        moved = text + self.leading * (columns >= first).long() + self.trailing * (columns >= second).long()
        lead = text.gather(1, first.clamp_max(self.t - 1)) + (first >= self.t).long()
        before = text.gather(1, (second - 1).clamp_min(0)) + 1
        trail = torch.where(second > first, before, lead) + self.leading
        virtual = torch.cat(
            [lead + torch.arange(self.leading, device=text.device), trail + torch.arange(self.trailing, device=text.device)], dim=1
        )
        return torch.cat([virtual, moved], dim=1).gather(1, self.index().expand(rows, -1))

    def take(self, assembled: Tensor, dim: int = 1) -> Tensor:
        """Return the columns :meth:`read` for the text, along `dim` of a tensor whose first dimension is b."""
        shape = [1] * assembled.ndim
        shape[0], shape[dim] = -1, self.t
        index = self.read().reshape(shape)
        target = list(assembled.shape)
        target[dim] = self.t
        return assembled.gather(dim, index.expand(target))


def extended(mask: Tensor, count: int) -> Tensor:
    """Return a mask (b, u) as (b, count + u), with `count` ones inserted where the text begins.

    This equals a mask with the virtual tokens anywhere in the text.
    """
    start, _ = _real(mask, mask.shape[1], mask.device)
    columns = torch.arange(count + mask.shape[1], device=mask.device)[None]
    inside = (columns >= start) & (columns < start + count)
    text = mask.gather(1, (columns - count * (columns >= start + count).long()).clamp(0, mask.shape[1] - 1).expand(mask.shape[0], -1))
    return torch.where(inside, torch.ones_like(text), text)


def _real(mask: Tensor | None, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first column of real tokens and the one after the last, each (b, 1)."""
    if mask is None:
        return torch.zeros(1, 1, dtype=torch.long, device=device), torch.full((1, 1), width, dtype=torch.long, device=device)
    columns = torch.arange(width, device=mask.device)[None]
    real = mask != 0
    start = torch.where(real, columns, width).amin(dim=1, keepdim=True)
    end = torch.where(real, columns + 1, 0).amax(dim=1, keepdim=True)
    return torch.where(start == width, 0, start), end
