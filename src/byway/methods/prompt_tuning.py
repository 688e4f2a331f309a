r"""Prompt tuning: [P_e ; E(x)], with P trained vectors P_e (P, d) among the embeddings E(x) of a frozen model's input.

::

    P_e (P, d) ──────┐
                     ├── [P_e ; E(x)] ── frozen model ── (columns of P_e removed) ── head
    x ── E (frozen) ─┘

Source: Lester et al., arXiv 2104.08691 §2 (initialization: §3.2); templates: Liu et al., arXiv 2103.10385 §3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byway.core.fields import Count, NonBlank
from byway.core.method import BuildContext, Method
from byway.errors import ConfigError
from byway.methods.virtual.method import VirtualTokenMethod, embedded
from byway.methods.virtual.peft import VirtualTokenPeftFormat
from byway.methods.virtual.template import token_ids

__all__ = ["PromptTuning"]

Init = Literal["random", "text", "vocabulary", "labels"]


class _PromptTuningPeftFormat(VirtualTokenPeftFormat["PromptTuning"]):
    def fields(self, method: PromptTuning) -> dict[str, Any]:
        return super().fields(method) | {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}


@dataclass(frozen=True, kw_only=True)
class PromptTuning(VirtualTokenMethod):
    """P trained vectors among the embeddings of each row; everything else is frozen.

    Trainable parameters: P·d, and those of the task head if there is one.

    Raises:
        ConfigError: a value out of range, or an `init` that needs a tokenizer without one.
        TargetError: the model reads no tokens.
    """

    init: Init = "random"
    """Initial vectors: ``random`` N(0, σ²), σ the standard deviation of the base's embeddings; ``text``: embeddings of
    `text`; ``vocabulary``: rows of the base's embedding, drawn without replacement; ``labels``: embeddings of the class
    names (averaged over their tokens), the rest as ``vocabulary``."""
    text: NonBlank | None = None
    """For init ``text``: start from the tokens of this text, repeated or cut to P."""
    labels: Sequence[NonBlank] | None = None
    """For init ``labels``: one word for each class; null: the names of the model's classes."""
    among: Count | None = None
    """Draw rows of the vocabulary from the first N ids only (many tokenizers order ids by frequency; Lester et al. used
    5,000)."""

    peft = _PromptTuningPeftFormat("PROMPT_TUNING")

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if (self.init == "text") != (self.text is not None):
            problems.append("init: text needs the field text, and text needs init: text")
        if self.labels is not None and self.init != "labels":
            problems.append("labels needs init: labels")
        return problems

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.init in ("text", "labels") and context.tokenizer is None:
            raise ConfigError(f"init: {self.init} needs the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)")
        return super().prepare(model, context)

    def start(self, model: nn.Module, embedding: nn.Module, count: int, context: BuildContext) -> tuple[Tensor, None]:
        return self._vectors(model, embedding, count, context), None

    def _vectors(self, model: nn.Module, embedding: nn.Module, count: int, context: BuildContext) -> Tensor:
        weight: Any = embedding.weight
        size = weight.shape[0]
        if self.init == "random" or context.filled:
            rows = embedded(embedding, torch.arange(min(size, _MEASURED)))
            normal = torch.randn(count, rows.shape[1], dtype=rows.dtype, generator=context.generator)
            return normal.to(rows.device) * rows.std()
        if self.init == "vocabulary":
            return self._drawn(embedding, count, context)
        if self.init == "text":
            ids = token_ids(context.tokenizer, str(self.text), size)
            return embedded(embedding, torch.tensor((ids * math.ceil(count / len(ids)))[:count]))
        named = [embedded(embedding, torch.tensor(token_ids(context.tokenizer, word, size))).mean(0) for word in self._classes(model)]
        if len(named) > count:
            raise ConfigError(f"{len(named)} labels need as many virtual tokens, not {count}", f"num_virtual_tokens: {len(named)}")
        rest = [self._drawn(embedding, count - len(named), context)] if len(named) < count else []
        return torch.cat([torch.stack(named), *rest])

    def _drawn(self, embedding: nn.Module, count: int, context: BuildContext) -> Tensor:
        weight: Any = embedding.weight
        size = min(weight.shape[0], self.among or weight.shape[0])
        if size < count:
            raise ConfigError(f"cannot draw {count} different rows from {size}", f"among: {count} or more")
        return embedded(embedding, torch.randperm(size, generator=context.generator)[:count])

    def _classes(self, model: nn.Module) -> Sequence[str]:
        if self.labels is not None:
            return self.labels
        settings: Any = model.config
        names = [str(name) for name in (settings.id2label or {}).values()]
        if not names or all(name.startswith("LABEL_") for name in names):
            raise ConfigError("init: labels needs class names, and the model has none", "labels: [word, ...]")
        return names


_MEASURED = 5_000
"""Rows of the embedding from which its standard deviation is computed."""
