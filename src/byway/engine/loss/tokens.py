"""The loss of predicted tokens, with logits only where there is a label, and only a chunk of those at a time.

Σ over labelled t of −log softmax(head(h_{t−1}))[label_t]; a sum and a count, so that gradient accumulation can weigh tokens exactly.

A pre-hook on the output embedding keeps the rows of the hidden state that predict a labelled token. Where the model does nothing to the
logits afterwards, its own head runs on no row at all and the loss is taken by :mod:`byway.engine.loss.cross_entropy`, which calls the head
(with the adapters on it) in chunks; else head and what follows it (a cap, a scale, a bias) run on those rows at once.
Legend: b batch, t tokens, d width, n labelled, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.attention import packed
from byway.core.families.reading import output_head
from byway.engine.attention.unpack import longest
from byway.engine.last_layer import reading
from byway.engine.loss.answers import answers
from byway.engine.loss.cross_entropy import NLL, LossTerms, chunk_rows, chunked_loss, summed_loss, trained_in
from byway.errors import ConfigError, TargetError

__all__ = ["IGNORED", "labelled_rows", "token_loss", "unchunked"]

IGNORED = -100
"""The label that is not learned, as everywhere in transformers."""


def token_loss(
    model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool, next_token: bool = True, terms: LossTerms = NLL
) -> tuple[Tensor, int]:
    """The summed negative log-likelihood (nats; float32, float64 of a float64 model) over labelled tokens, and how many there are.

    Args:
        model: a language model.
        batch: ``input_ids`` and ``labels`` (b, t) as transformers has them; with ``attention_mask`` if padded, or with ``position_ids``
            and ``cu_seq_lens_q`` if documents are packed (then inside :func:`byway.engine.attention.packing.packing`).
        labels_only: compute logits for labelled tokens only; else for all, which is the plain twin.
        next_token: ``labels[t]`` is predicted at t − 1 (a causal language model); else at t (a masked one, or the decoder of an
            encoder-decoder, which reads the labels shifted unless ``decoder_input_ids`` are given).
        terms: label smoothing and z-loss, which are then in the sum.

    A batch without any label gives a zero that can be differentiated, and 0.
    """
    labels: Tensor = batch["labels"]
    inputs = _inputs(model, batch, next_token=next_token)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if next_token else labels  # (b, t): what each position is to predict
    keep = targets != IGNORED
    targets = targets[keep]  # (n,)
    count = len(targets)
    with answers(labels), reading(keep), packed(longest(inputs)) if "cu_seq_lens_q" in inputs else nullcontext():
        if not (labels_only and count):
            return summed_loss(model(**inputs).logits[keep], targets, terms), count
        head, follows = output_head(model)
        with labelled_rows(head, keep, held_back=not follows) as rows:
            logits = model(**inputs).logits
        if len(rows) != 1:
            raise TargetError(f"the output embedding is called {len(rows)} times in one forward, so rows cannot be left out")
        if follows:
            return summed_loss(logits.reshape(count, -1), targets, terms), count
        size = chunk_rows(logits.shape[-1], logits.device)
        return chunked_loss(head, rows[0], targets, terms, trained=trained_in(logits), rows=size), count


def unchunked(model: nn.Module) -> str:
    """Why the logits of all labelled tokens are held at once, or ``""``."""
    return "the model changes the logits after its output embedding" if output_head(model)[1] else ""


@contextmanager
def labelled_rows(head: nn.Module, keep: Tensor, *, held_back: bool = False) -> Iterator[list[Tensor]]:
    """Within this context the output embedding sees only the rows of the hidden state (b, t, d) that `keep` (b, t) marks: (n, d).

    The rows are in the list, one entry a call. `held_back`: the head itself sees none of them, (b, 0, d), cut off from the graph, so that
    what its output depends on is the head alone.
    """
    rows: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != keep.shape:
            raise TargetError("the output embedding is not called with the hidden state of every token, so rows cannot be left out")
        rows.append(hidden[keep.to(hidden.device)])
        return (hidden.detach()[:, :0] if held_back else rows[-1], *args[1:])

    # first of all pre-hooks: adapters on the head see the same rows as the head itself
    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield rows
    finally:
        handle.remove()


def _inputs(model: nn.Module, batch: Mapping[str, Any], *, next_token: bool) -> dict[str, Any]:
    """What the model is called with: the batch without its labels, which a decoder behind an encoder reads shifted to the right."""
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
            raise ConfigError(f"{type(model).__name__} does not shift labels itself", "put decoder_input_ids into the batch") from None
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs | {"use_cache": False}
