"""What the tests of ladders share: one attached with random parameters, and the ladders of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

import byway
from byway.methods.ladder.network import Ladder
from tests.tiny import randomize


def attached(model: nn.Module, **fields: Any) -> Any:
    adapter = byway.attach(model, byway.LadderSideTuning(**fields))
    randomize(adapter.named_parameters(), scale=0.5)
    return adapter


def ladders(model: nn.Module) -> list[Ladder]:
    return [side for _, _, side in byway.side_paths(model) if isinstance(side, Ladder)]
