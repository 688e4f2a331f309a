"""The loss of next-token prediction, with logits only where there is a label.

Σ over labelled t of −log softmax(head(h_{t−1}))[label_t]; a sum and a count, so that gradient accumulation can weigh tokens exactly.

The saving keeps the rows of the hidden state that predict a labelled token, by a pre-hook on the output embedding: the model's own head,
the adapters on it and whatever follows it (a cap, a scale) run on those rows alone.
Legend: b batch, t tokens, d width, n labelled, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.engine.answers import answers
from byway.engine.attention import packed
from byway.errors import TargetError
from byway.families import facts

__all__ = ["IGNORED", "labelled_rows", "token_loss"]

IGNORED = -100
"""The label that is not learned, as everywhere in transformers."""


def token_loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
    """The summed negative log-likelihood (nats, float32) over labelled tokens, and how many there are.

    Args:
        model: a causal language model.
        batch: ``input_ids`` and ``labels`` (b, t), unshifted; with ``attention_mask`` if padded, or with ``position_ids`` and
            ``cu_seq_lens_q`` if documents are packed (then inside :func:`byway.engine.attention.packing`).
        labels_only: compute logits for labelled tokens only; else for all, which is the plain twin.

    A batch without any label gives a zero that can be differentiated, and 0.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # (b, t): what each position is to predict
    keep = targets != IGNORED
    count = int(keep.sum())
    with answers(batch["labels"]), packed() if "cu_seq_lens_q" in inputs else nullcontext():
        if labels_only and count:
            with labelled_rows(model, keep):
                logits = model(**inputs, use_cache=False).logits  # (n, v)
            logits = logits.reshape(count, -1)
        else:
            logits = model(**inputs, use_cache=False).logits[keep]  # (n, v)
    return F.cross_entropy(logits.float(), targets[keep], reduction="sum"), count


@contextmanager
def labelled_rows(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Within this context the output embedding sees only the rows of the hidden state (b, t, d) that `keep` (b, t) marks: (n, d)."""
    path = facts(model).require("head")
    head = model.get_submodule(path)

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != keep.shape:
            raise TargetError(f"{path} is not called with the hidden state of every token, so rows cannot be left out")
        return (hidden[keep], *args[1:])

    # first of all pre-hooks: adapters on the head see the same rows as the head itself
    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def no_grad_loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> float:
    """Mean loss per labelled token, in nats, without a graph; 0.0 where nothing is labelled."""
    with torch.no_grad():
        total, count = token_loss(model, batch, labels_only=labels_only)
    return float(total) / max(count, 1)
