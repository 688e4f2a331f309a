"""The base class of prefix tuning and P-tuning v2: fields, sites and initialization."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from byway.core.families.attentions import KeyValueHeads
from byway.core.fields import Dropout, NonBlank
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site
from byway.core.weights import device_of
from byway.errors import ConfigError
from byway.methods.prefix.sides import Prefix, PrefixedAttention, Table, base_states, groups, shifts
from byway.methods.virtual.template import token_ids

__all__ = ["PrefixMethod", "relative_bias_table"]

Init = Literal["random", "normal", "zero"]

Size = Annotated[int, Ge(1), Le(65_536)]
_SCALES: Mapping[str, float] = {"random": 0.02, "normal": 1.0, "zero": 0.0}


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(Method):
    """P trained keys and values in front of the real ones, in every chosen attention."""

    num_virtual_tokens: Size = 5
    """P: number of trained keys and values in front of the real ones, in every attention."""
    hidden_size: Size | None = 512
    """m: width of the MLP (Linear(d, m), tanh, Linear(m, ·)) that computes the keys and values from an embedding; null:
    train the keys and values directly."""
    dropout: Dropout = 0.0
    """Dropout probability on the trained keys and values."""
    init: Init = "random"
    """Initial keys and values: ``random`` N(0, 0.02²), ``normal`` N(0, 1) (as HF peft does), or ``zero``. With an MLP,
    ``random`` and ``normal`` give its embedding N(0, 1) and its maps torch's default; ``zero`` makes all keys and
    values 0."""
    init_text: NonBlank | None = None
    """Start from the keys and values that the frozen base computes for this text, repeated or cut to P tokens (needs a
    tokenizer)."""
    attentions: str | Sequence[str] | None = None
    """Attentions that get a prefix: ``encoder``, ``decoder``, ``cross``, each with its own parameters; null: all that
    the model has."""
    relative_bias: Literal["none", "earlier"] = "none"
    """Relative position bias of the prefix in T5: ``none`` (0), or ``earlier``, the bias of P tokens right before the
    text (as HF peft does)."""
    pairs: Literal["own", "interleaved"] = "own"
    """Which of the L pairs of keys and values layer i of an encoder-decoder reads: its ``own``, or pair 2i mod L (what
    HF peft computes: with an even L, half of the pairs are never read and each of the others is read by two layers)."""

    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.attentions, str):
            object.__setattr__(self, "attentions", (self.attentions,))
        super().__post_init__()

    def contradictions(self) -> list[str]:
        problems: list[str] = []
        if self.init_text is not None and self.init == "zero":
            problems.append("init: zero and init_text do not go together")
        if self.attentions is not None and (not self.attentions or len(set(self.attentions)) != len(self.attentions)):
            problems.append(f"attentions is {list(self.attentions)!r}; list each once, or use null for all")
        if self.pairs == "interleaved" and self.init_text is not None:
            problems.append("pairs: interleaved and init_text do not go together: two layers would read the values of one layer")
        return problems

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.init_text is not None and context.tokenizer is None:
            raise ConfigError("init_text needs the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)")
        return self

    def plan(self, model: nn.Module) -> Placement:
        """Choose the root, which owns the trained tensors; :meth:`extras` adds attentions and position shifts."""
        from byway.core.attention import check

        check(model)
        groups(model, self.attentions)
        return Placement([Site("", model)])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        found = groups(model, self.attentions)
        first = model.get_submodule(next(iter(found.values()))[0].path)
        wide = any(p.dtype == torch.float64 for p in first.parameters())
        dtype = torch.float64 if wide else torch.float32
        interleaved = self.pairs == "interleaved"
        tables = {
            name: Table(places, self.num_virtual_tokens, self.hidden_size, dtype, interleaved=interleaved) for name, places in found.items()
        }
        for table in tables.values():
            table.initialize(self.init, context.generator, _SCALES[self.init])
        if self.init_text is not None and context.trusted:
            every = [place for places in found.values() for place in places]
            copied = base_states(model, self._ids(model, context.tokenizer), every)
            for table in tables.values():
                table.copy_rows([copied[place.path] for place in table.places])
        prefix = Prefix(tables).to(device_of(first))
        context.shared[Prefix] = prefix
        return prefix

    def _ids(self, model: nn.Module, tokenizer: Any) -> Tensor:
        """Return the tokens of `init_text`, repeated or cut to P."""
        settings: Any = model.config
        if model.main_input_name != "input_ids":
            raise ConfigError(f"init_text: {type(model).__name__} reads {model.main_input_name}, not text", "choose an init")
        ids = token_ids(tokenizer, str(self.init_text), settings.get_text_config().vocab_size)
        count = self.num_virtual_tokens
        return torch.tensor((ids * math.ceil(count / len(ids)))[:count])

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        prefix = context.shared[Prefix]
        for path, module, side in shifts(model, prefix.names, self.num_virtual_tokens):
            yield Site(path, module), side
        for name in prefix.names:
            places = prefix.table(name).places
            earlier = relative_bias_table(model, places) if self.relative_bias == "earlier" else None
            for index, place in enumerate(places):
                side = PrefixedAttention(prefix, name, index, dropout=self.dropout, earlier=earlier)
                yield Site(place.path, model.get_submodule(place.path)), side


def relative_bias_table(model: nn.Module, places: Sequence[KeyValueHeads]) -> nn.Module | None:
    """Return the attention that owns the relative position bias of its stack, or None."""
    modules = (model.get_submodule(place.path) for place in places)
    return next((module for module in modules if "relative_attention_bias" in module._modules), None)
