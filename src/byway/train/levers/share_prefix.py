"""``engine.share_prefix``: a prefix that several rows of one forward pass share is run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from byway.data.encode import Example
from byway.engine.shared_prefix import LEAST, Sharing, share
from byway.tasks.task import Task
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Lever, On, Saving, Setting
from byway.train.order import Order

__all__ = ["SharePrefix", "sharing_of"]


@dataclass(frozen=True)
class SharePrefix(Lever):
    """Prefixes shared by rows (a system prompt, few-shot examples) are computed once per forward pass."""

    key = "share_prefix"
    place = 40
    stage = "packed"
    worth = 0.01

    sharing: Sharing | None = None
    """What rows share; set when it is on."""

    def cannot(self, setting: Setting, on: On) -> str:
        if not on.packed:
            return "rows are not packed"
        if not setting.task.language_model or not all(isinstance(example, Example) for example in setting.examples):
            return "it is for language models"
        return "" if setting.probe.alike else f"no two rows share a prefix of at least {LEAST} tokens before the first token in the loss"

    def savings(self, setting: Setting, on: On) -> Iterator[Saving]:
        sharing = Sharing(setting.examples)
        lengths = [setting.task.length(example) for example in setting.examples]
        steps = Order(lengths, setting.train, micro_tokens=setting.micro_tokens, pack=True, sharing=sharing).epoch(0)
        saved = sharing.saved(steps)
        yield Saving(SharePrefix(sharing), saved, "fewer tokens", f"{sharing.shared_tokens(steps)} tokens, {saved:.1%} fewer")

    def batch(self, task: Task[Any], examples: Sequence[Any], batch: dict[str, Any]) -> dict[str, Any]:
        return share(batch)


def sharing_of(engaged: Engaged) -> Sharing | None:
    """What rows share, if it is computed once."""
    lever = engaged.find(SharePrefix)
    return None if lever is None else lever.sharing
