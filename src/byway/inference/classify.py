"""The scores that a sequence classifier gives to texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from byway.base.heads import HEADS
from byway.core.families.positions import Positions
from byway.core.modes import evaluating
from byway.data.collate import pad_labelled, pad_token_id
from byway.data.labelled import unlabelled
from byway.errors import ConfigError, DataError
from byway.tasks.classification import row_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["class_scores", "classifies"]

LONGEST = 2**20
"""Tokens of the longest text where neither model nor tokenizer has a limit."""


def classifies(model: PreTrainedModel) -> bool:
    """True if `model` gives one answer for a sequence: scores of classes, or a number."""
    return type(model).__name__.endswith(tuple(ending for head in HEADS.values() if head.labels for ending in head.endings))


def class_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """Return for each text the score of every class by its name.

    Scores are probabilities that sum to 1; independent probabilities if the problem is multi-label; the predicted
    number itself if it is a regression. Texts are cut to `max_length` tokens, and to the model's limit.

    Raises:
        ConfigError: there is no tokenizer.
        DataError: a text is empty.
    """
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so text cannot be encoded", "use a base with a tokenizer")
    if any(not text.strip() for text in texts):
        raise DataError("a text is empty, so there is nothing to classify")
    limits = (max_length, tokenizer.model_max_length, Positions.of(model).limit, LONGEST)
    examples = unlabelled(texts, tokenizer, min(limit for limit in limits if limit is not None))
    config: Any = model.config
    device = next(model.parameters()).device
    found: list[dict[str, float]] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = pad_labelled(examples[start : start + batch_size], pad_token_id(tokenizer))
            logits = row_logits(model, {key: value.to(device) for key, value in batch.items()})  # (rows, classes)
            if config.problem_type == "multi_label_classification":
                logits = logits.sigmoid()
            elif config.problem_type != "regression" and logits.shape[1] > 1:
                logits = logits.softmax(-1)
            found += [{str(config.id2label[i]): score for i, score in enumerate(row)} for row in logits.tolist()]
    return found
