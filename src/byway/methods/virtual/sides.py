"""Side paths that insert virtual tokens into a trunk's input and remove their columns from its output.

No state is kept between the two: the layout follows from the mask and the labels. A cache contains the virtual tokens
after the first call. Later calls recognize that from its length, extend the mask and shift the positions.

Notation: b batch, t tokens of this call, P trained virtual tokens, K virtual columns in a row (P and the fixed words),
n = t + K, d width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families.positions import Positions, length_of, past_length
from byway.core.slots import ModuleRef, SidePath
from byway.engine.loss.answers import labels_here, pop, push
from byway.errors import AdapterError
from byway.methods.virtual.layout import Layout, extended
from byway.methods.virtual.template import Template

__all__ = ["Answers", "EncoderStates", "Place", "VirtualTokens", "Words"]

Words = Sequence[Sequence[int]]
"""Token ids of each piece of fixed words."""

_RUNS = ("last_hidden_state", "hidden_states", "attentions")
"""Outputs of a trunk that have one entry per token."""


@dataclass(frozen=True)
class Place:
    """The place of virtual tokens in the rows of one trunk."""

    positions: Positions
    after_first: bool
    """True if the leading tokens follow the first token ([CLS])."""
    before_last: bool
    """True if the trailing tokens stand before the last token ([SEP]); else after the text."""
    keeps: bool
    """True if the output keeps the states of virtual tokens: in an encoder, for the decoder to attend to."""
    generates: bool
    """True if the model predicts the next token, so that trailing tokens stand before the answer."""
    pools_virtual: bool = False
    """True if a head that classifies a row from its first column reads the first virtual token there, as in HF peft."""


class VirtualTokens(SidePath):
    """[P_e ; E(x)]: virtual tokens P_e (P, d) among the embeddings of a row.

    P_e is `start`, a trained parameter (P, d), or the output of a trained `encoder` for it.
    """

    def __init__(
        self, embedding: nn.Module, place: Place, template: Template, words: Words, start: Tensor, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(start.contiguous())
        self.encoder = encoder
        self.embedding = ModuleRef(embedding)
        self.place = place
        self.template = template
        device = next(embedding.parameters()).device
        for number, ids in enumerate(words):
            self.register_buffer(f"words_{number}", torch.tensor(list(ids), dtype=torch.long, device=device))

    def vectors(self) -> Tensor:
        """Return P_e."""
        return self.prompt_embeddings if self.encoder is None else self.encoder(self.prompt_embeddings)

    def export(self) -> dict[str, Tensor]:
        with torch.enable_grad():  # use the same kernels as in training
            return {"prompt_embeddings": self.vectors().detach()}

    def resize(self, found: Mapping[str, Tensor]) -> None:
        """Give the fixed words the lengths in the file: loading them needs no tokenizer."""
        for name, own in list(self.named_buffers()):
            if name in found and found[name].shape != own.shape and found[name].ndim == 1:
                self.register_buffer(name, torch.zeros(found[name].shape, dtype=own.dtype, device=own.device))

    @property
    def leading(self) -> int:
        """Number of virtual columns before the text."""
        return self._columns(self.template.before, 0)

    @property
    def trailing(self) -> int:
        """Number of virtual columns after the text."""
        before = sum(isinstance(piece, str) for piece in self.template.before)
        return self._columns(self.template.after, before)

    def _columns(self, pieces: Sequence[int | str], words: int) -> int:
        total = 0
        for piece in pieces:
            total += 1 if isinstance(piece, int) else self.get_buffer(f"words_{words}").shape[0]
            words += isinstance(piece, str)
        return total

    @property
    def count(self) -> int:
        """K."""
        return self.leading + self.trailing

    def _virtual(self) -> Tensor:
        """Return the vectors of all virtual columns, leading ones first: (K, d)."""
        vectors = self.vectors()
        if self.template.is_plain:
            return vectors
        found, words = [], 0
        for piece in self.template.pieces:
            if isinstance(piece, int):
                found.append(vectors[piece : piece + 1])
            else:
                found.append(self.embedding.module(self.get_buffer(f"words_{words}")[None])[0].to(vectors.dtype))
                words += 1
        return torch.cat(found)

    # ---------------------------------------------------------------- in

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
        if inputs.get("cu_seq_lens_q") is not None:
            raise AdapterError("virtual tokens would have to be inserted into every document of a packed batch", "engine.pack: off")
        if cache is not None and cache.is_compileable:
            raise AdapterError("a static cache has no room for virtual tokens", "use the default, dynamic cache")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise AdapterError("virtual tokens need a two-dimensional mask, (batch, tokens)", "pass the tokenizer's attention_mask")
        past = past_length(inputs)
        return self._continued(inputs, past) if past else self._inserted(inputs)

    def _inserted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Insert the virtual tokens, in the first call."""
        ids, mask, given = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("position_ids")
        t = length_of(inputs)
        limit = self.place.positions.limit
        if limit is not None and t + self.count > limit:
            room = limit - self.count
            raise AdapterError(
                f"{t} tokens and {self.count} virtual tokens do not fit into the model's {limit} positions",
                f"truncate to {room} tokens (data.max_length), or use fewer virtual tokens" if room > 0 else "use fewer virtual tokens",
            )
        text = inputs.get("inputs_embeds")
        if text is None:
            text = self.embedding.module(ids)
        layout = self._layout(t, mask, text.device, self._labels(inputs))
        changed = inputs | {"inputs_embeds": layout.assemble(self._virtual().to(text.dtype), text)}
        if "input_ids" in inputs:
            changed["input_ids"] = None
        if mask is not None:
            changed["attention_mask"] = layout.put(mask, 1)
        if inputs.get("token_type_ids") is not None:
            changed["token_type_ids"] = layout.put(inputs["token_type_ids"], 0)
        counted = self.place.positions.padding_id is not None and ids is not None
        # otherwise the base numbers the assembled row correctly by itself
        if self.place.positions.accepted and (counted or mask is not None or given is not None):
            own = self.place.positions.explicit(inputs, 0)
            if given is not None and mask is None and not torch.compiler.is_compiling() and bool((given.diff(dim=1) < 0).any()):
                raise AdapterError(
                    "position_ids start over within a row, as in a packed batch; virtual tokens need one text per row", "pad"
                )
            changed["position_ids"] = layout.positions(own)
        return changed

    def _layout(self, t: int, mask: Tensor | None, device: torch.device, labels: Tensor | None, put_in: int = 0) -> Layout:
        options = {"after_first": self.place.after_first, "before_last": self.place.before_last, "put_in": put_in}
        return Layout.of(t, mask, device, leading=self.leading, trailing=self.trailing, labels=labels, **options)

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the labels if they determine where the trailing tokens stand; None: the whole row is text."""
        if not (self.place.generates and self.trailing):
            return None
        if torch.compiler.is_compiling():
            raise AdapterError("virtual tokens after {text} cannot be compiled in a model that predicts the next token")
        labels = labels_here()
        if labels is not None and labels.shape[-1] != length_of(inputs):
            raise AdapterError(
                f"there are labels for {labels.shape[-1]} tokens, but a row has {length_of(inputs)}, including other virtual tokens",
                "attach the template with virtual tokens after {text} first",
            )
        if labels is None and inputs.get("use_cache") is False and inputs.get("past_key_values") is None:
            raise AdapterError(
                "the template has virtual tokens after {text}, and nothing says where the answer begins",
                "pass labels, call within byway.engine.loss.answers.answers(labels), or generate with use_cache=True",
            )
        return labels

    def _continued(self, inputs: dict[str, Any], past: int) -> dict[str, Any]:
        """Extend mask and positions in a later call, whose cache holds the virtual tokens."""
        mask, given, t = inputs.get("attention_mask"), inputs.get("position_ids"), length_of(inputs)
        missing = mask is not None and mask.shape[1] + self.count > past + t
        if mask is None and given is not None and not torch.compiler.is_compiling():
            missing = int(given.max()) + 1 == past + t
        if missing:
            raise AdapterError(
                f"the cache of {past} tokens holds no virtual tokens: it was filled without the adapter, or cropped (assisted decoding)",
                "start a new cache with the adapter active",
            )
        changed = dict(inputs)
        if self.place.positions.accepted and (mask is not None or given is not None):
            changed["position_ids"] = self.place.positions.explicit(inputs, past) + self.count
        if mask is not None:
            changed["attention_mask"] = extended(mask, self.count)
        return changed

    # ---------------------------------------------------------------- out

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        embeds = inputs.get("inputs_embeds")
        # only in the first call with a cache, or in one without, are the virtual columns in the output
        if self.place.keeps or embeds is None or past_length(inputs) not in (0, embeds.shape[1]):
            return out
        last = out[0]
        n, t = last.shape[1], last.shape[1] - self.count
        mask = inputs.get("attention_mask")
        put_in = (n if mask is None else mask.shape[1]) - t
        labels = labels_here() if self.place.generates and self.trailing else None
        layout = self._layout(t, mask, last.device, labels, put_in)
        if isinstance(out, tuple):
            return (self._answered(last, layout), *(_shortened(value, layout, n) for value in out[1:]))
        changed = {name: _shortened(value, layout, n) if name in _RUNS else value for name, value in out.items()}
        return type(out)(**(changed | {"last_hidden_state": self._answered(last, layout)}))

    def _answered(self, last: Tensor, layout: Layout) -> Tensor:
        """Return the last states (b, t, d) of the text columns, from those of all columns (b, n, d)."""
        text = layout.take(last)
        if not self.place.pools_virtual:
            return text
        index = layout.first.expand(last.shape[0], 1)[..., None].expand(-1, -1, last.shape[-1])
        return torch.cat([last.gather(1, index), text[:, 1:]], dim=1)


class EncoderStates(SidePath):
    """On the decoder of an encoder-decoder: extend the mask over the encoder's states to the virtual tokens."""

    def __init__(self, tokens: VirtualTokens) -> None:
        super().__init__()
        self.tokens = ModuleRef(tokens)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        tokens = self.tokens.module
        assert isinstance(tokens, VirtualTokens)
        # states that were computed without this adapter have the length of their mask
        if states is None or mask is None or mask.ndim != 2 or states.shape[1] - mask.shape[1] < tokens.count:
            return inputs
        return inputs | {"encoder_attention_mask": extended(mask, tokens.count)}


class Answers(SidePath):
    """On the root of a causal language model: pass its labels on to the trunk."""

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not torch.compiler.is_compiling():
            push(inputs.get("labels"))
        return inputs

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        if not torch.compiler.is_compiling():
            pop()
        return out


def _shortened(value: Any, layout: Layout, n: int) -> Any:
    """Return only the text columns of hidden states (b, n, d), attention weights (b, h, n, n), or tuples of them."""
    if isinstance(value, tuple):
        return tuple(_shortened(part, layout, n) for part in value)
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return value
    if value.ndim == 3:
        return layout.take(value) if value.shape[1] == n else value
    value = layout.take(value, 2) if value.shape[2] == n else value
    return layout.take(value, 3) if value.shape[3] == n else value
