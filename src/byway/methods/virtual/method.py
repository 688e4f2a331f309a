"""What prompt tuning and P-tuning have in common as methods: the template, where it hangs, and HF peft's files."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.families import Facts, facts
from byway.core.families.positions import Positions
from byway.core.families.table import FAMILIES
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site
from byway.errors import AdapterError, ConfigError, TargetError
from byway.methods.virtual.sides import Answers, EncoderStates, Place, VirtualTokens, Words
from byway.methods.virtual.template import Template

__all__ = ["VirtualTokenMethod"]

USUAL = 20
"""How many virtual tokens stand before the text where nothing is said: the few of P-tuning's templates are little for a sentence, the
100 of Lester et al. much of a short context."""

_LARGEST = 100_000
_OURS, _THEIRS, _PROMPT = "base_model.model.", "base_model.", "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(Method):
    """P trained vectors among the embeddings of each row."""

    num_virtual_tokens: int | None = None
    """P; none: 20, or as many as the template names."""
    template: str | None = None
    """Where virtual tokens stand: ``<T>`` is one, ``<T*5>`` five, ``<T3>`` the third, ``{text}`` the row, anything else fixed words (which
    need the tokenizer); none: all of them before the text."""
    placement: Literal["auto", "first", "after_cls"] = "auto"
    """``first``: before a row's first token; ``after_cls``: behind it, so that an encoder pools its ``[CLS]``; ``auto``: what fits."""

    identity_at_start: ClassVar[bool] = False
    packable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self._problems()
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems(self) -> list[str]:
        """Everything wrong with the fields."""
        problems, count = [], self.num_virtual_tokens
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _LARGEST):
            problems.append(f"num_virtual_tokens is {count!r}; it must be a whole number from 1 to {_LARGEST}")
        if self.placement not in ("auto", "first", "after_cls"):
            problems.append(f"placement is {self.placement!r}; it must be auto, first or after_cls")
        if self.template is not None:
            try:
                named = Template.parse(self.template).count
            except ConfigError as error:
                problems.append(error.message)
            else:
                if count is not None and count != named:
                    problems.append(f"num_virtual_tokens is {count}, but the template has {named}: leave one of them out")
        return problems

    @property
    def parsed(self) -> Template:
        """What stands where."""
        return Template.plain(self.num_virtual_tokens or USUAL) if self.template is None else Template.parse(self.template)

    # ---------------------------------------------------------------- where

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.parsed.words and context.tokenizer is None:
            raise ConfigError(
                "the template has fixed words: they need the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)"
            )
        return self

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """The trunk whose input is text: of an encoder-decoder the encoder."""
        known = facts(model)
        path = _trunk(model, known)
        yield Site(path, model.get_submodule(path))

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        why = self.declines_peft(model)
        return (f"saved in Byway's own format: {why}",) if why else ()

    def _place(self, model: nn.Module, site: Site) -> Place:
        known = facts(model)
        row = FAMILIES.get(known.model_type)
        encoder = (known.kind if row is None or known.kind == "decoder" else row.kind) == "encoder"
        return Place(
            positions=Positions.of(site.module),
            after_first=self.placement == "after_cls" or (encoder and self.placement == "auto"),
            before_last=known.kind != "decoder",
            keeps=_decoder(known) is not None,
            generates=known.kind == "decoder" and known.head is not None,
            pools_virtual=encoder and self.placement == "first" and type(model).__name__.endswith("ForSequenceClassification"),
        )

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        trunk: Any = site.module
        template = self.parsed
        words = template.tokens(context.tokenizer) if context.tokenizer is not None else [[0]] * len(template.words)
        embedding = trunk.get_input_embeddings()
        largest = max((token for ids in words for token in ids), default=0)
        if largest >= embedding.weight.shape[0]:
            raise ConfigError("the template's tokenizer knows more tokens than the base", "pass the base's own tokenizer")
        side = self.tokens(model, embedding, self._place(model, site), template, words, context)
        context.shared[VirtualTokens] = side
        return side

    @abstractmethod
    def tokens(
        self,
        model: nn.Module,
        embedding: nn.Module,
        place: Place,
        template: Template,
        words: Words,
        context: BuildContext,
    ) -> VirtualTokens:
        """The side path that holds the trained vectors."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        side = context.shared[VirtualTokens]
        decoder = _decoder(facts(model))
        if decoder is not None:
            yield Site(decoder, model.get_submodule(decoder)), EncoderStates(side)
        if side.place.generates and side.template.after and "labels" in inspect.signature(type(model).forward).parameters:
            yield Site("", model), Answers()

    # ---------------------------------------------------------------- HF peft's files

    def declines_peft(self, model: nn.Module) -> str:
        """peft puts its tokens before the first one, and knows no template."""
        if not self.parsed.is_plain:
            return "HF peft has no templates"
        (site,) = self.sites(model)
        if self._place(model, site).after_first:
            return "HF peft puts virtual tokens before [CLS] and pools the first of them (placement: first)"
        return ""

    def to_peft(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.parsed.count}

    def peft_fields(self, hung: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        site, side = next((site, side) for site, side in hung if isinstance(side, VirtualTokens))
        trunk: Any = site.module
        double = any(isinstance(other, EncoderStates) for _, other in hung)
        return {
            "token_dim": side.export()[_PROMPT].shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": trunk.config.num_attention_heads,
            "num_layers": trunk.config.num_hidden_layers,
        } | ({"task_type": "SEQ_2_SEQ_LM"} if double and config["task_type"] is None else {})

    def to_peft_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The prompt has no prefix, and heads have one ``model`` fewer."""
        return {
            _PROMPT if name == _PROMPT or name.endswith(f".{_PROMPT}") else _THEIRS + name.removeprefix(_OURS): tensor
            for name, tensor in tensors.items()
        }

    @classmethod
    def from_peft_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Of the rows that peft writes for encoder and decoder the first half is used, there as here."""
        trunk = _trunk(model, facts(model))
        found = {}
        for name, tensor in tensors.items():
            if name == _PROMPT:
                count = config.get("num_virtual_tokens")
                halves = config.get("num_transformer_submodules") == 2 and isinstance(count, int) and tensor.shape[0] == 2 * count
                found[f"{_OURS}{trunk}.{_PROMPT}" if trunk else _PROMPT] = tensor[:count].clone() if halves else tensor
            else:
                found[_OURS + name.removeprefix(_THEIRS) if name.startswith(_THEIRS) else name] = tensor
        return found

    @classmethod
    def peft_values(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that all these methods read from a peft configuration."""
        count = config.get("num_virtual_tokens")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise AdapterError(f"num_virtual_tokens is {count!r}; it must be a whole number of at least 1")
        saved = tuple(config.get("modules_to_save") or ()) or "none"
        return {"num_virtual_tokens": count, "placement": "first", "modules_to_save": saved}


def _decoder(known: Facts) -> str | None:
    """The decoder that attends to the states of an encoder, or None."""
    return known.stack_modules.get("decoder") if known.kind == "encoder-decoder" else None


def _trunk(model: nn.Module, known: Facts) -> str:
    """The module whose input is a row of tokens.

    Raises:
        TargetError: the model reads no tokens, or it cannot be told where.
    """
    path = known.stack_modules.get("encoder") if known.kind == "encoder-decoder" else known.trunk
    if path is None:
        path = known.require("trunk")
    takes = inspect.signature(type(model.get_submodule(path)).forward).parameters
    wrong = known.kind in ("vision", "unknown") or "inputs_embeds" not in takes or "pixel_values" in takes
    if wrong:
        name = type(model).__name__
        raise TargetError(f"virtual tokens stand among embedded tokens, and {name} takes none", "use another method for this model")
    return path


def embedded(embedding: nn.Module, ids: Tensor) -> Tensor:
    """The base's vectors for these ids, (…, d), in float32 (float64 for a float64 base), without a graph."""
    weight: Any = embedding.weight
    with torch.no_grad():
        found = embedding(ids.to(weight.device))
    return found.to(torch.promote_types(found.dtype, torch.float32))
