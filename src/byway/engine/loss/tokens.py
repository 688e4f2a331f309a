"""The loss over tokens: logits are computed only for the tokens in the loss, and only a chunk of them at a time.

    Σ over labelled t of −log softmax(head(h_{t−1}))[label_t]

returned as a sum and a count, so that gradient accumulation can weigh tokens exactly.

A pre-hook on the output embedding selects the rows of the hidden state that predict a labelled token. If the model does
nothing to the logits afterwards, the model's own call of the head gets no row at all, and
:mod:`byway.engine.loss.cross_entropy` calls the head (with its adapters) in chunks. Else the head, and what follows it
(a cap, a scale, a bias), runs on those rows at once.

Shapes: b batch, t tokens, d width, n labelled tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.attention import packed
from byway.core.families import output_head
from byway.engine.attention.unpack import longest
from byway.engine.last_layer import positions_read
from byway.engine.loss.answers import answers
from byway.engine.loss.cross_entropy import NLL, LossTerms, chunk_rows, chunked_loss, summed_loss, trained_in
from byway.errors import ConfigError, TargetError

__all__ = ["IGNORED", "labelled_rows", "token_loss", "unchunked"]

IGNORED = -100
"""The label of a token that is not in the loss, as in transformers."""


def token_loss(
    model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool, next_token: bool = True, terms: LossTerms = NLL
) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood of the labelled tokens (nats, at least float32) and their number.

    Without any label in the batch, returns a differentiable zero and 0.

    Args:
        model: a language model.
        batch: ``input_ids`` and ``labels`` (b, t) as in transformers, with ``attention_mask`` if padded, or with
            ``position_ids`` and ``cu_seq_lens_q`` if documents are packed (then inside
            :func:`byway.engine.attention.packing.packing`).
        labels_only: compute logits for labelled tokens only; False, the plain twin: for all tokens.
        next_token: True if ``labels[t]`` is predicted at t − 1 (a causal language model); False if at t (a masked
            language model, or the decoder of an encoder-decoder, which reads the labels shifted unless the batch has
            ``decoder_input_ids``).
        terms: label smoothing and z-loss, included in the sum.
    """
    labels: Tensor = batch["labels"]
    inputs = _inputs(model, batch, next_token=next_token)
    # (b, t): the token to predict at each position
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if next_token else labels
    keep = targets != IGNORED
    targets = targets[keep]  # (n,)
    count = len(targets)
    with answers(labels), positions_read(keep), packed(longest(inputs)) if "cu_seq_lens_q" in inputs else nullcontext():
        if not (labels_only and count):
            return summed_loss(model(**inputs).logits[keep], targets, terms), count
        head, follows = output_head(model)
        with labelled_rows(head, keep, held_back=not follows) as rows:
            logits = model(**inputs).logits
        if len(rows) != 1:
            raise TargetError(f"the output embedding is called {len(rows)} times in one forward pass, so no rows can be left out")
        if follows:
            return summed_loss(logits.reshape(count, -1), targets, terms), count
        size = chunk_rows(logits.shape[-1], logits.device)
        return chunked_loss(head, rows[0], targets, terms, trained=trained_in(logits), rows=size), count


def unchunked(model: nn.Module) -> str:
    """Return why the logits of all labelled tokens are held at once; ``""`` if they are not."""
    return "the model changes the logits after its output embedding" if output_head(model)[1] else ""


@contextmanager
def labelled_rows(head: nn.Module, keep: Tensor, *, held_back: bool = False) -> Iterator[list[Tensor]]:
    """Pass the output embedding only the rows (n, d) of the hidden state (b, t, d) that `keep` (b, t) marks.

    Yields a list of the rows, one entry per call. `held_back`: the head gets none of them but (b, 0, d), detached from
    the graph, so that its output depends on the parameters of the head alone.
    """
    rows: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != keep.shape:
            raise TargetError("the output embedding is not called with the hidden state of every token, so no rows can be left out")
        rows.append(hidden[keep.to(hidden.device)])
        return (hidden.detach()[:, :0] if held_back else rows[-1], *args[1:])

    # before all other pre-hooks: adapters on the head see the same rows as the head
    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield rows
    finally:
        handle.remove()


def _inputs(model: nn.Module, batch: Mapping[str, Any], *, next_token: bool) -> dict[str, Any]:
    """Return the model's arguments: the batch without labels, which a decoder behind an encoder reads shifted."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if next_token:
        return inputs | {"use_cache": False}
    config: Any = model.config
    if not config.is_encoder_decoder:
        return inputs
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        try:
            shift: Any = model.prepare_decoder_input_ids_from_labels
        except AttributeError:
            raise ConfigError(f"{type(model).__name__} does not shift labels itself", "add decoder_input_ids to the batch") from None
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs | {"use_cache": False}
