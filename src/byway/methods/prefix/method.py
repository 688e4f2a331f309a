"""What prefix tuning and P-tuning v2 have in common as methods: their fields, where they hang, how they start, and HF peft's files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.families import facts
from byway.core.fields import dropout_problems
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.weights import device_of
from byway.errors import AdapterError, ConfigError
from byway.methods.prefix.sides import CROSS, Place, Prefix, PrefixedAttention, Table, groups, shifts, words

__all__ = ["PrefixMethod"]

Init = Literal["random", "normal", "zero"]

_MOST = 65_536
_SCALES: Mapping[str, float] = {"random": 0.02, "normal": 1.0, "zero": 0.0}
_OURS, _THEIRS = "base_model.model.", "base_model."


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(Method):
    """P trained keys and values in front of the real ones, in every attention that is chosen."""

    num_virtual_tokens: int = 5
    """P: how many keys and values are put in front, in each attention."""
    hidden_size: int | None = 512
    """m: the keys and values are made by an MLP, Linear(d, m), tanh, Linear(m, ·), from an embedding; none: they are trained directly."""
    dropout: float = 0.0
    """Dropout on the trained keys and values, in [0, 1)."""
    init: Init = "random"
    """How keys and values start that are trained directly: ``random`` N(0, 0.02²), ``normal`` N(0, 1) (as HF peft does), ``zero``; an MLP
    starts from N(0, 1) and its maps' usual range, with ``zero`` from all keys and values 0."""
    init_text: str | None = None
    """Start from the keys and values that the frozen base has for these words, repeated or cut to P tokens (needs a tokenizer)."""
    attentions: str | Sequence[str] | None = None
    """Which attentions have a prefix: ``encoder``, ``decoder``, ``cross``, each with its own parameters; none: all that the model has."""
    relative_bias: Literal["none", "earlier"] = "none"
    """What T5's relative distances add for the prefix: ``none`` (no distance, bias 0), or ``earlier``: what they would add for P tokens
    right before the text (as HF peft does)."""
    pairs: Literal["own", "interleaved"] = "own"
    """Which keys and values layer i of an encoder-decoder's L reads: its ``own``, or the pair 2i mod L (what HF peft computes: with an
    even L half of the pairs are never read, and two layers share each of the others)."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    identity_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.attentions, str):
            object.__setattr__(self, "attentions", (self.attentions,))
        super().__post_init__()
        problems = [
            f"{name} is {value!r}; it must be a whole number from 1 to {_MOST}"
            for name, value in (("num_virtual_tokens", self.num_virtual_tokens), ("hidden_size", self.hidden_size))
            if not (name == "hidden_size" and value is None) and not _whole(value)
        ]
        problems += dropout_problems(self.dropout)
        if self.init not in _SCALES:
            problems.append(f"init is {self.init!r}; it must be random, normal or zero")
        if self.init_text is not None and (not isinstance(self.init_text, str) or not self.init_text.strip()):
            problems.append(f"init_text is {self.init_text!r}; it must be words, or left out")
        if self.init_text is not None and self.init == "zero":
            problems.append("init: zero and init_text do not go together")
        if self.attentions is not None and (not self.attentions or len(set(self.attentions)) != len(self.attentions)):
            problems.append(f"attentions is {list(self.attentions)!r}; name each once, or leave it out for all")
        if self.relative_bias not in ("none", "earlier"):
            problems.append(f"relative_bias is {self.relative_bias!r}; it must be none or earlier")
        if self.pairs not in ("own", "interleaved"):
            problems.append(f"pairs is {self.pairs!r}; it must be own or interleaved")
        if self.pairs == "interleaved" and self.init_text is not None:
            problems.append("pairs: interleaved and init_text do not go together: two layers would read one layer's words")
        if problems:
            raise ConfigError("; ".join(problems))

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        if self.init_text is not None and context.tokenizer is None:
            raise ConfigError("init_text needs the base's tokenizer", "byway.attach(model, method, tokenizer=tokenizer)")
        return self

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """The root, which owns what is trained; the attentions and what numbers the tokens follow in :meth:`extras`."""
        from byway.core.attention import check

        check(model)
        groups(model, self.attentions)
        yield Site("", model)

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        why = self.declines_peft(model)
        return (f"saved in Byway's own format: {why}",) if why else ()

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        found = groups(model, self.attentions)
        first = model.get_submodule(next(iter(found.values()))[0].path)
        wide = any(p.dtype == torch.float64 for p in first.parameters())
        dtype = torch.float64 if wide else torch.float32
        tables = {name: self._table(places, dtype) for name, places in found.items()}
        for table in tables.values():
            table.start(self.init, context.generator, _SCALES[self.init])
        if self.init_text is not None and context.trusted:
            every = [place for places in found.values() for place in places]
            copied = words(model, self._ids(model, context.tokenizer), every)
            for table in tables.values():
                table.copy_rows([copied[place.path] for place in table.places])
        prefix = Prefix(tables).to(device_of(first))
        context.shared[Prefix] = prefix
        return prefix

    def _table(self, places: Sequence[Place], dtype: torch.dtype) -> Table:
        return Table(places, self.num_virtual_tokens, self.hidden_size, dtype, interleaved=self.pairs == "interleaved")

    def _ids(self, model: nn.Module, tokenizer: Any) -> Tensor:
        """(P): the words' tokens, repeated or cut."""
        settings: Any = model.config
        if model.main_input_name != "input_ids":
            raise ConfigError(f"init_text: {type(model).__name__} reads {model.main_input_name}, not text", "choose an init")
        ids = tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"init_text {self.init_text!r} has no token in this tokenizer")
        if max(ids) >= settings.get_text_config().vocab_size:
            raise ConfigError("init_text: the tokenizer knows more tokens than the base", "pass the base's own tokenizer")
        count = self.num_virtual_tokens
        return torch.tensor((list(ids) * math.ceil(count / len(ids)))[:count])

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        prefix = context.shared[Prefix]
        for path, module, side in shifts(model, prefix.names, self.num_virtual_tokens):
            yield Site(path, module), side
        for name in prefix.names:
            places = prefix.table(name).places
            earlier = _relative(model, places) if self.relative_bias == "earlier" else None
            for index, place in enumerate(places):
                side = PrefixedAttention(prefix, name, index, dropout=self.dropout, earlier=earlier)
                yield Site(place.path, model.get_submodule(place.path)), side

    def declines_peft(self, model: nn.Module) -> str:
        """peft has one prefix, of equal sizes in every layer, through the cache; in an encoder-decoder that of the decoder alone."""
        found = groups(model, self.attentions)
        if len(found) > 1:
            return f"HF peft holds one prefix, and these are {len(found)}: {', '.join(found)}"
        ((name, places),) = found.items()
        if len({(place.heads, place.key_size, place.value_size) for place in places}) > 1 or places[0].key_size != places[0].value_size:
            return "in HF peft's prefix all keys and values have the same size"
        if name == CROSS or (facts(model).kind == "encoder-decoder" and name != "decoder"):
            return f"HF peft puts a prefix only into the decoder's self-attention, not into {name}"
        if not _takes_cache(model):
            return f"HF peft puts a prefix into the cache, which {type(model).__name__} does not take"
        if self.relative_bias == "none" and _relative(model, places) is not None:
            return "HF peft adds relative distances to the prefix (relative_bias: earlier)"
        if (self.pairs == "interleaved") != (facts(model).kind == "encoder-decoder"):
            return "HF peft reads the pairs of an encoder-decoder, and of nothing else, in another order (pairs: interleaved)"
        return ""

    def to_peft(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "prefix_projection": False, "init_weights": None}

    def peft_fields(self, hung: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """The shapes: a row of ``prompt_embeddings`` (P, 2·L·g·e) is, as (2L, g, e), the keys and the values of each layer in turn."""
        site, prefix = next((site, side) for site, side in hung if isinstance(side, Prefix))
        places = prefix.table(prefix.names[0]).places
        width = places[0].heads * places[0].key_size
        double = facts(site.module).kind == "encoder-decoder"
        return {
            "num_layers": len(places),
            "num_attention_heads": places[0].heads,
            "token_dim": width,
            "encoder_hidden_size": width,
            "num_transformer_submodules": 2 if double else 1,
        } | ({"task_type": "SEQ_2_SEQ_LM"} if double else {})

    def to_peft_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Heads trained beside a prefix have one ``model`` fewer in their names."""
        return {_THEIRS + name.removeprefix(_OURS) if name.startswith(_OURS) else name: t for name, t in tensors.items()}

    @classmethod
    def from_peft_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        tops = {path.partition(".")[0] for path, _ in base_modules(model) if path}
        return {
            _OURS + rest if (rest := name.removeprefix(_THEIRS)) != name and rest.partition(".")[0] in tops else name: t
            for name, t in tensors.items()
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PrefixMethod:
        """What a peft file holds: keys and values (its MLP is folded), no dropout, and of an encoder-decoder the decoder's alone."""
        count = config.get("num_virtual_tokens")
        if not isinstance(count, int) or not _whole(count):
            raise AdapterError(f"num_virtual_tokens is {count!r}; it must be a whole number of at least 1")
        method = cls(
            num_virtual_tokens=count,
            hidden_size=None,
            dropout=0.0,
            init="zero" if config.get("init_weights") == "zero" else "normal",
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )
        if config.get("num_transformer_submodules") == 2 or config.get("task_type") == "SEQ_2_SEQ_LM":
            return replace(method, attentions=("decoder",), relative_bias="earlier", pairs="interleaved")
        return method


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _takes_cache(model: nn.Module) -> bool:
    """Whether a prefix can be passed to the model or to its trunk as a cache."""
    trunk = facts(model).trunk
    asked = [model] if trunk is None else [model, model.get_submodule(trunk)]
    return any("past_key_values" in inspect.signature(type(module).forward).parameters for module in asked)


def _relative(model: nn.Module, places: Sequence[Place]) -> nn.Module | None:
    """The attention of a stack that holds its table of relative distances, or None."""
    modules = (model.get_submodule(place.path) for place in places)
    return next((module for module in modules if "relative_attention_bias" in module._modules), None)
