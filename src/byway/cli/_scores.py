"""What ``byway generate`` shows of a model that does not write text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from byway.cli import ui
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["show_scores"]


def show_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
    *,
    max_length: int | None,
    batch_size: int,
    compare: bool,
) -> None:
    """Print a line for each prompt with the scores that a classifier gives to its classes, the highest first.

    `compare`: also those of the base model.

    Raises:
        ConfigError: the model is no sequence classifier either.
    """
    from byway.core.attach import disabled
    from byway.inference.classify import class_scores, classifies

    if not classifies(model):
        raise ConfigError(f"{type(model).__name__} neither writes text nor classifies it", "use it from Python: find(path).load()")
    ui.note(f"{type(model).__name__} is a classifier, which writes no text. These are the scores of its classes.")
    options = {"max_length": max_length, "batch_size": batch_size}
    found = class_scores(model, tokenizer, prompts, **options)
    if not compare:
        for scores in found:
            ui.out(_line(scores))
        return
    with disabled(model):
        bare = class_scores(model, tokenizer, prompts, **options)
    for prompt, with_adapter, without in zip(prompts, found, bare, strict=True):
        ui.out(f"prompt:  {prompt}\nbase:    {_line(without)}\nadapter: {_line(with_adapter)}\n")


def _line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.4f}" for name, score in sorted(scores.items(), key=lambda pair: -pair[1]))
