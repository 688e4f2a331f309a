"""``engine.labels_only``: the output head runs only where a token is in the loss."""

from __future__ import annotations

from torch import nn

from byway.engine.loss.tokens import unchunked
from byway.train.levers.lever import Lever, On, Setting

__all__ = ["LabelsOnly"]


class LabelsOnly(Lever):
    """No logits without a label. The task's loss does this if it is called with ``labels_only=True``."""

    key = "labels_only"
    place = 10

    def cannot(self, setting: Setting, on: On) -> str:
        return "" if setting.task.language_model else "it is for language models: here the head runs once per row"

    def line(self, model: nn.Module) -> str:
        why = unchunked(model)
        return f"unchunked: {why}" if why else ""
