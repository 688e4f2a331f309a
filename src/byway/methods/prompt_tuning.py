r"""Prompt tuning: [P_e ; E(x)], P trained vectors P_e (P, d) among the embeddings E(x) of a frozen model's input.

::

    P_e (P, d) ──────┐
                     ├── [P_e ; E(x)] ── frozen model ── (columns of P_e taken out) ── head
    x ── E (frozen) ─┘

Source: Lester et al., arXiv 2104.08691 §2 (starts: §3.2); templates: Liu et al., arXiv 2103.10385 §3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.method import BuildContext, Method
from byway.errors import ConfigError
from byway.methods.virtual.method import VirtualTokenMethod, embedded
from byway.methods.virtual.sides import Place, VirtualTokens, Words
from byway.methods.virtual.template import Template

__all__ = ["PromptTuning"]

Init = Literal["random", "text", "vocabulary", "labels"]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(VirtualTokenMethod):
    """P trained vectors among the embeddings of each row; everything else is frozen.

    Trained: P·d numbers, and the task head where there is one.

    Raises:
        ConfigError: a value out of range, or a start that needs a tokenizer without one.
        TargetError: the model reads no tokens.
    """

    init: Init = "random"
    """How they start: ``random`` N(0, σ²) with σ the deviation of the base's own embeddings; ``text``; ``vocabulary``: rows of the base's
    embedding, drawn without repeating; ``labels``: the words for the classes (several tokens averaged), then rows of the vocabulary."""
    text: str | None = None
    """For ``text``: the tokens of these words, repeated or cut to P."""
    labels: Sequence[str] | None = None
    """For ``labels``: a word for each class; none: the names of the model's classes."""
    among: int | None = None
    """For rows of the vocabulary: draw among the first so many ids (many tokenizers order them by frequency; Lester et al. used 5,000)."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.init not in ("random", "text", "vocabulary", "labels"):
            problems.append(f"init is {self.init!r}; it must be random, text, vocabulary or labels")
        if (self.init == "text") != (self.text is not None):
            problems.append("init: text and the field text go together")
        if self.text is not None and not self.text.strip():
            problems.append("text is empty")
        if self.labels is not None and self.init != "labels":
            problems.append("labels are for init: labels")
        if self.labels is not None and (isinstance(self.labels, str) or not all(isinstance(w, str) and w.strip() for w in self.labels)):
            problems.append(f"labels is {self.labels!r}; it must be a list of words")
        if self.among is not None and (not isinstance(self.among, int) or isinstance(self.among, bool) or self.among < 1):
            problems.append(f"among is {self.among!r}; it must be a whole number of at least 1")
        return problems

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.init in ("text", "labels") and context.tokenizer is None:
            raise ConfigError(f"init: {self.init} needs the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)")
        return super().prepare(model, context)

    def tokens(
        self,
        model: nn.Module,
        embedding: nn.Module,
        place: Place,
        template: Template,
        words: Words,
        context: BuildContext,
    ) -> VirtualTokens:
        start = (
            self._random(embedding, template.count, context) if context.filled else self._start(model, embedding, template.count, context)
        )
        return _Prompt(embedding, place, template, words, start)

    def _start(self, model: nn.Module, embedding: nn.Module, count: int, context: BuildContext) -> Tensor:
        if self.init == "random":
            return self._random(embedding, count, context)
        if self.init == "vocabulary":
            return self._drawn(embedding, count, context)
        if self.init == "text":
            ids = _ids(context.tokenizer, str(self.text), embedding)
            return embedded(embedding, torch.tensor((ids * math.ceil(count / len(ids)))[:count]))
        named = [embedded(embedding, torch.tensor(_ids(context.tokenizer, word, embedding))).mean(0) for word in self._classes(model)]
        if len(named) > count:
            raise ConfigError(f"there are {len(named)} labels and {count} virtual tokens", f"num_virtual_tokens: {len(named)}")
        rest = [self._drawn(embedding, count - len(named), context)] if len(named) < count else []
        return torch.cat([torch.stack(named), *rest])

    def _random(self, embedding: nn.Module, count: int, context: BuildContext) -> Tensor:
        weight: Any = embedding.weight
        rows = embedded(embedding, torch.arange(min(weight.shape[0], _MEASURED)))
        normal = torch.randn(count, rows.shape[1], dtype=rows.dtype, generator=context.generator)
        return normal.to(rows.device) * rows.std()

    def _drawn(self, embedding: nn.Module, count: int, context: BuildContext) -> Tensor:
        weight: Any = embedding.weight
        size = min(weight.shape[0], self.among or weight.shape[0])
        if size < count:
            raise ConfigError(f"{count} rows cannot be drawn among {size} without repeating", f"among: at least {count}")
        return embedded(embedding, torch.randperm(size, generator=context.generator)[:count])

    def _classes(self, model: nn.Module) -> Sequence[str]:
        if self.labels is not None:
            return self.labels
        settings: Any = model.config
        names = [str(name) for name in (settings.id2label or {}).values()]
        if not names or all(name.startswith("LABEL_") for name in names):
            raise ConfigError("init: labels needs words for the classes, and the model names none", "labels: [word, ...]")
        return names

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PromptTuning:
        """How the file's vectors once started is not needed any more."""
        return cls(**cls.peft_values(config))


_MEASURED = 5_000
"""Rows of the embedding over which its deviation is measured."""


class _Prompt(VirtualTokens):
    """The vectors themselves are trained."""

    def __init__(self, embedding: nn.Module, place: Place, template: Template, words: Words, start: Tensor) -> None:
        super().__init__(embedding, place, template, words)
        self.prompt_embeddings = nn.Parameter(start.contiguous())

    def vectors(self) -> Tensor:
        return self.prompt_embeddings


def _ids(tokenizer: Any, text: str, embedding: nn.Module) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    weight: Any = embedding.weight
    if not ids:
        raise ConfigError(f"the tokenizer makes no token of {text!r}")
    if max(ids) >= weight.shape[0]:
        raise ConfigError("the tokenizer knows more tokens than the base", "pass the base's own tokenizer")
    return ids
