"""``engine.pack``: rows side by side without padding, each attending only to itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from byway.core.adapter import adapters
from byway.engine.attention.packing import packing
from byway.train.levers.lever import Lever, On, Setting

__all__ = ["Pack"]


class Pack(Lever):
    """No padding: saves whatever share of a padded batch is padding."""

    key = "pack"
    place = 0

    def cannot(self, setting: Setting, on: On) -> str:
        alone = [name for name, adapter in adapters(setting.model).items() if not adapter.method.packable]
        if alone:
            return f"{alone[0]} cannot be packed: its virtual tokens are inside the rows"
        lengths = {setting.task.length(example) for example in setting.examples}
        if self.wish(setting.engine) == "auto" and setting.engine.share_prefix != "on" and len(lengths) == 1:
            return "all rows have the same length, so there is no padding"
        return ""

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        return packing(model)
