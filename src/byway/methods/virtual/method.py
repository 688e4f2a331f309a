"""The base class of prompt tuning and P-tuning: the template and where it is attached."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from byway.core.families import Facts, facts
from byway.core.families.detect import pretrained_models
from byway.core.families.positions import Positions
from byway.core.families.table import FAMILIES
from byway.core.method import BuildContext, Method, Placement
from byway.core.modes import evaluating
from byway.core.slots import SidePath, Site, side_paths
from byway.core.weights import device_of, is_embedding
from byway.errors import ConfigError, TargetError
from byway.methods.virtual.sides import Answers, EncoderStates, Place, VirtualTokens
from byway.methods.virtual.template import Template, token_ids

__all__ = ["VirtualTokenMethod", "embedded", "trunk_of"]

USUAL = 20
"""Virtual tokens before the text by default: P-tuning's templates have too few for a sentence, and the 100 of Lester et
al. take much of a short context."""
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a model may raise when it is called without an input that it needs."""


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(Method):
    """P trained vectors among the embeddings of each row."""

    num_virtual_tokens: Annotated[int, Ge(1), Le(100_000)] | None = None
    """P: number of virtual tokens; null: as many as the template has, or 20."""
    template: str | None = None
    """Order of virtual tokens and text: ``<T>`` is one virtual token, ``<T*5>`` five, ``<T3>`` the third, ``{text}``
    the row, anything else fixed words (which need the tokenizer); null: all virtual tokens before the text."""
    placement: Literal["auto", "first", "after_cls"] = "auto"
    """``first``: before the first token of a row; ``after_cls``: after it, so that an encoder still pools ``[CLS]``;
    ``auto``: whichever fits the model."""

    identity_at_start: ClassVar[bool] = False
    packable: ClassVar[bool] = False

    def contradictions(self) -> list[str]:
        if self.template is None:
            return []
        try:
            named = Template.parse(self.template).count
        except ConfigError as error:
            return [error.message]
        if self.num_virtual_tokens in (None, named):
            return []
        return [f"num_virtual_tokens is {self.num_virtual_tokens}, but the template has {named}: leave one of them out"]

    @property
    def parsed(self) -> Template:
        """The template, or that of `num_virtual_tokens` before the text."""
        return Template.plain(self.num_virtual_tokens or USUAL) if self.template is None else Template.parse(self.template)

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.parsed.words and context.tokenizer is None:
            raise ConfigError(
                "the fixed words of the template need the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)"
            )
        return self

    def plan(self, model: nn.Module) -> Placement:
        """Choose the trunk whose input is text: in an encoder-decoder, the encoder."""
        below = next((name for _, name, side in side_paths(model) if side.detached), None)
        if below is not None:
            raise TargetError(
                f"virtual tokens would be trained below the ladder {below!r}, which passes no gradient to them",
                "detach the ladder, or use one of the two",
            )
        site = trunk_of(model)
        if why := needs_ids(model, site.module):
            raise TargetError(
                f"{type(model).__name__} {why}, and virtual tokens have embeddings only",
                "use a method without virtual tokens: lora, prefix_tuning",
            )
        return Placement([site])

    def place(self, model: nn.Module, trunk: nn.Module) -> Place:
        """Return where virtual tokens go in the rows of `trunk`."""
        known = facts(model)
        row = FAMILIES.get(known.model_type)
        encoder = (known.kind if row is None or known.kind == "decoder" else row.kind) == "encoder"
        return Place(
            positions=Positions.of(trunk),
            after_first=self.placement == "after_cls" or (encoder and self.placement == "auto"),
            before_last=known.kind != "decoder",
            keeps=_decoder(known) is not None,
            generates=known.kind == "decoder" and known.head is not None,
            pools_virtual=encoder and self.placement == "first" and type(model).__name__.endswith("ForSequenceClassification"),
        )

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        trunk: Any = site.module
        template = self.parsed
        embedding = trunk.get_input_embeddings()
        # each piece is tokenized by itself, so that no token spans two pieces
        words = [
            [0] if context.tokenizer is None else token_ids(context.tokenizer, text, embedding.weight.shape[0]) for text in template.words
        ]
        start, encoder = self.start(model, embedding, template.count, context)
        side = context.shared[VirtualTokens] = VirtualTokens(embedding, self.place(model, trunk), template, words, start, encoder)
        return side

    @abstractmethod
    def start(self, model: nn.Module, embedding: nn.Module, count: int, context: BuildContext) -> tuple[Tensor, nn.Module | None]:
        """Return the initial values of the trained vectors (count, d), and the encoder that they go through, if any."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        side = context.shared[VirtualTokens]
        decoder = _decoder(facts(model))
        if decoder is not None:
            yield Site(decoder, model.get_submodule(decoder)), EncoderStates(side)
        if side.place.generates and side.template.after and "labels" in inspect.signature(type(model).forward).parameters:
            yield Site("", model), Answers()


def _decoder(known: Facts) -> str | None:
    """Return the decoder that attends to the states of an encoder, or None."""
    return known.stack_modules.get("decoder") if known.kind == "encoder-decoder" else None


def trunk_of(model: nn.Module) -> Site:
    """Return the module whose input is a row of tokens.

    Raises:
        TargetError: the model reads no tokens, or its trunk cannot be determined.
    """
    known = facts(model)
    path = known.stack_modules.get("encoder") if known.kind == "encoder-decoder" else known.trunk
    if path is None:
        path = known.require("trunk")
    trunk = model.get_submodule(path)
    takes = inspect.signature(type(trunk).forward).parameters
    if known.kind in ("vision", "unknown") or "inputs_embeds" not in takes or "pixel_values" in takes:
        name = type(model).__name__
        raise TargetError(f"{name} takes no embedded tokens, to which virtual tokens could be added", "use another method for this model")
    return Site(path, trunk)


def needs_ids(model: nn.Module, trunk: Any) -> str:
    """Say how a trunk reads more from token ids than their embeddings (Gemma 3n's inputs of each layer); ``""`` if not.

    Two tokens go through it, as ids and as embeddings. A trunk on the meta device, or one that does not run on ids
    alone, cannot be tried.
    """
    embedding = trunk.get_input_embeddings() if pretrained_models({"": trunk}) else None
    if embedding is None or not is_embedding(embedding):
        return "has no single embedding of tokens"
    if any(p.is_meta for p in trunk.parameters()):
        return ""
    middle = embedding.num_embeddings // 2  # special tokens, which may be masked or not counted, are at the ends
    ids = torch.tensor([[middle, middle + 1]], device=device_of(embedding)).clamp_max(embedding.num_embeddings - 1)
    options = {"use_cache": False} if "use_cache" in inspect.signature(type(trunk).forward).parameters else {}
    with evaluating(model), torch.no_grad():
        try:
            wanted, again = (trunk(input_ids=ids, **options)[0] for _ in range(2))
        except _FAILURES:
            return ""
        if not torch.equal(wanted, again):  # it draws, so that nothing can be compared
            return ""
        vectors = embedding(ids)
        try:
            trunk(inputs_embeds=vectors.mean(dim=1, keepdim=True), **options)  # a vector that no id has
            found = trunk(inputs_embeds=vectors, **options)[0]
        except _FAILURES as failure:
            return f"does not run on embedded tokens without their ids ({type(failure).__name__})"
    limit = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return "" if float((found - wanted).abs().max()) <= limit else "computes something else from embedded tokens than from their ids"


def embedded(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Return the base's embeddings of these ids, (…, d), in float32 (float64 on a float64 base), detached."""
    weight: Any = embedding.weight
    with torch.no_grad():
        found = embedding(ids.to(weight.device))
    return found.to(torch.promote_types(found.dtype, torch.float32))
