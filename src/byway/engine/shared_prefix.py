"""A prefix shared by several documents of a pack (a system prompt, few-shot examples) is run once.

::

    packed   a b c d e │ a b c x y │ a b c x z      15 tokens
    shared   a b c d e │ x y │ z                     8 tokens
    keys     a b c d e │ a b c x y │ a b c x z       of each segment: spans of the row, the last one its own

Documents are sorted by their tokens, so that each has its longest shared prefix with the one before it. It takes that
prefix over span by span, so prefixes within prefixes need no special case. Positions continue as if the prefix were
there. In a causal model the keys and values of a prefix do not depend on what follows, so the result is the same;
autograd adds up their gradients over the documents. A token whose hidden state predicts a token in the loss is always
computed for its own document, so the loss counts the labels of each document as before.

With dropout, masks are drawn anew as for any other pack, and documents that share a prefix share its masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from byway.data.batches import Step
from byway.data.encode import Example
from byway.data.tokens import IGNORED

__all__ = ["KEY", "LEAST", "Segment", "Sharing", "layout", "segments", "share"]

KEY = "prefix_spans"
"""The batch's key, passed on to every attention: for each segment the spans (begin, end) of the row that precede it."""
LEAST = 8
"""Shortest prefix worth sharing, in tokens; below that the copies of an extra attention call cost more."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a document that is computed for it alone."""

    document: int
    """Index of the document."""
    begin: int
    """The first position of the document in this segment; the tokens before it are shared."""
    end: int
    """Length of the document."""
    prefix: tuple[Span, ...]
    """The spans of the row that hold its first `begin` tokens."""


def layout(documents: Sequence[list[Any]], limits: Sequence[int], least: int = LEAST) -> list[Segment]:
    """Return the segments of a row in which each shared prefix of at least `least` tokens is held once.

    Args:
        documents: the tokens of each document.
        limits: how many first tokens of each document may be computed for another one.
        least: shortest prefix to share.

    Returns:
        the segments in the order of the row. A document that is a prefix of another and predicts nothing has none.
    """
    found: list[Segment] = []
    before: list[Any] = []
    spans: tuple[Span, ...] = ()
    at = 0
    for number in sorted(range(len(documents)), key=lambda place: documents[place]):
        tokens = documents[number]
        common = min(_common(before, tokens), limits[number])
        common = common if common >= least else 0
        kept: list[Span] = []
        left = common
        for a, b in spans:
            if left > 0:
                kept.append((a, min(b, a + left)))
                left -= b - a
        prefix = tuple(kept)
        own = len(tokens) - common
        if own:
            found.append(Segment(number, common, len(tokens), prefix))
        before, spans = tokens, (*prefix, (at, at + own)) if own else prefix
        at += own
    return found


def _common(one: list[Any], other: list[Any]) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def _limit(labels: Sequence[int]) -> int:
    """Return how many first tokens of a document may be shared: those before the one that predicts its first label."""
    first = next((place for place in range(1, len(labels)) if labels[place] != IGNORED), len(labels) + 1)
    return first - 1


# -------------------------------------------------------------------- batches


def segments(batch: Mapping[str, Any], least: int = LEAST) -> list[Segment]:
    """Return the :func:`layout` of a batch made by :func:`byway.data.collate.pack_batch`."""
    bounds = list(pairwise(batch["cu_seq_lens_q"].tolist()))
    # ids, positions, types
    known = torch.stack([batch[name][0] for name in _columns(batch) if name != "labels"], dim=1).tolist()
    labels = batch["labels"][0].tolist()
    return layout([known[a:b] for a, b in bounds], [_limit(labels[a:b]) for a, b in bounds], least)


def share(batch: dict[str, Any], least: int = LEAST) -> dict[str, Any]:
    """Return a packed batch with each shared prefix held once; `batch` itself if there is none.

    The columns are a selection of the packed ones, so positions continue where the prefix ends. ``cu_seq_lens_q/k``
    hold the starts of the segments, ``prefix_spans`` (:data:`KEY`) for each segment the spans of the row that precede
    it. The batch is for causal models inside :func:`byway.engine.attention.packing.packing`, whose attention raises an
    error if it cannot share prefixes.
    """
    found = segments(batch, least)
    total = int(batch["cu_seq_lens_q"][-1])
    lengths = [segment.end - segment.begin for segment in found]
    if sum(lengths) == total:
        return batch
    starts = batch["cu_seq_lens_q"].tolist()
    device = batch["input_ids"].device
    kept = torch.cat([torch.arange(starts[s.document] + s.begin, starts[s.document] + s.end) for s in found]).to(device)
    bounds = torch.zeros(len(found) + 1, dtype=torch.int32)
    bounds[1:] = torch.cumsum(torch.tensor(lengths), 0)
    bounds = bounds.to(batch["cu_seq_lens_q"].device)
    return {
        **batch,
        **{name: batch[name][:, kept] for name in _columns(batch)},
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": max(lengths),
        "max_length_k": max(segment.end for segment in found),
        KEY: tuple(segment.prefix for segment in found),
    }


def _columns(batch: Mapping[str, Any]) -> list[str]:
    """Return the keys of the batch with one number per token."""
    shape = batch["input_ids"].shape
    return [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape]


# -------------------------------------------------------------------- the plan


class Sharing:
    """The shared prefixes of a run's rows: how many tokens are computed, and how rows form micro-batches."""

    def __init__(self, examples: Sequence[Example], least: int = LEAST) -> None:
        self.documents = [example.input_ids for example in examples]
        self.limits = [_limit(example.labels) for example in examples]
        self.least = least

    def layout(self, micro: Sequence[int]) -> list[Segment]:
        """Return the segments of these rows in one micro-batch; documents by their index in `micro`."""
        return layout([self.documents[i] for i in micro], [self.limits[i] for i in micro], self.least)

    def tokens(self, micro: Sequence[int]) -> int:
        """Return the tokens computed for these rows in one micro-batch."""
        return sum(segment.end - segment.begin for segment in self.layout(micro))

    def saved(self, steps: Sequence[Step]) -> float:
        """Return the share of the rows' tokens that is not computed, in [0, 1)."""
        micros = [micro for step in steps for micro in step]
        real = sum(len(self.documents[i]) for micro in micros for i in micro)
        return 1 - sum(map(self.tokens, micros)) / real if real else 0.0

    def shared_tokens(self, steps: Sequence[Step]) -> int:
        """Return the median length of a shared prefix; 0 if there is none."""
        found = sorted(s.begin for step in steps for micro in step for s in self.layout(micro) if s.begin)
        return found[len(found) // 2] if found else 0

    def rearranged(self, step: Step, limit: int) -> Step:
        """Return the rows of `step` in micro-batches of at most `limit` computed tokens, sharing what they can.

        The number of micro-batches is that of a greedy pass over the rows in the order of their tokens, and the largest
        is as small as possible. A row longer than `limit` is on its own. Returns `step` if nothing is saved.
        """
        rows = [i for micro in step for i in micro]
        prefixes = self._prefixes(rows)
        fewest = len(self._runs(prefixes, limit))
        low, high = 1, limit
        while low < high:
            middle = (low + high) // 2
            if len(self._runs(prefixes, middle)) <= fewest:
                high = middle
            else:
                low = middle + 1
        place = {index: position for position, index in enumerate(rows)}
        runs = tuple(tuple(sorted(run, key=place.__getitem__)) for run in self._runs(prefixes, high))
        return runs if sum(map(self.tokens, runs)) < sum(map(self.tokens, step)) else step

    def closest(self, count: int) -> list[int]:
        """Return `count` short rows, of which two share a prefix and one has labels; ``[]`` if there are none."""
        prefixes = [*self._prefixes(range(len(self.documents))).items()]
        length = {index: len(self.documents[index]) for index, _ in prefixes}
        pairs = [
            (length[one] + length[other], place)
            for place, ((one, _), (other, prefix)) in enumerate(pairwise(prefixes))
            if prefix and self.limits[other] < length[other]
        ]
        if not pairs:
            return []
        _, place = min(pairs)
        return [index for index, _ in prefixes[place : place + count]]

    def _prefixes(self, rows: Sequence[int]) -> dict[int, int]:
        """Return how many tokens each row can take over from the one before it; rows in the order of their tokens."""
        ordered = sorted(rows, key=lambda i: (self.documents[i], i))
        commons = [min(_common(self.documents[a], self.documents[b]), self.limits[b]) for a, b in pairwise(ordered)]
        return dict(zip(ordered, [0, *(common if common >= self.least else 0 for common in commons)], strict=True))

    def _runs(self, prefixes: Mapping[int, int], limit: int) -> list[list[int]]:
        runs: list[list[int]] = []
        room = 0
        for index, prefix in prefixes.items():
            length = len(self.documents[index])
            if not runs or length - prefix > room:
                runs.append([])
                room, prefix = limit, 0
            runs[-1].append(index)
            room -= length - prefix
        return runs
