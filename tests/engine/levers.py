"""The levers that are tested together, proved on a batch that is given padded and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from byway.engine.loss.tokens import token_loss
from byway.train.levers.choose import levers
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Loss, Wish
from byway.train.levers.prove import Plain, plainly, prove

FIRST = tuple(lever for lever in levers() if lever.stage == "first")
KEYS = tuple(lever.key for lever in FIRST)


def proved(
    model: nn.Module,
    padded: Mapping[str, Any],
    packed: Mapping[str, Any] | None,
    wishes: Mapping[str, Wish],
    *,
    loss: Loss = token_loss,
    cannot: Mapping[str, str] | None = None,
    plain: Plain | None = None,
) -> Engaged:
    """``prove`` with the first levers; `packed` None: the batch cannot be packed."""
    refused = dict(cannot or {})
    if packed is None:
        refused.setdefault("pack", "these examples cannot be packed")
    return prove(
        model,
        FIRST,
        lambda engaged: packed if packed is not None and engaged.packed else padded,
        wishes,
        plain=plainly(model, padded, loss=loss) if plain is None else plain,
        loss=loss,
        cannot=refused,
    )
