"""A head that several documents of one pack have in common (a system prompt, few-shot examples) is run once.

::

    packed   a b c d e │ a b c x y │ a b c x z      15 tokens
    shared   a b c d e │ x y │ z                     8 tokens
    keys     a b c d e │ a b c x y │ a b c x z       of each segment: stretches of the row, the last one its own

Documents are put into the order of their tokens, where each has its longest common head with the one before it; what it shares is taken
over from there, stretch by stretch, so that heads within heads need nothing special. Positions go on where they would have been. In a
causal model the keys and values of a head do not depend on what follows, so this is the same computation; autograd adds up their gradients
over the documents. A token whose hidden state predicts a learned token is always computed by its own document, so that the loss counts
each document's labels as before.

With dropout, masks are drawn anew as for any other pack, and documents have those of the head in common.
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

__all__ = ["KEY", "LEAST", "Segment", "Sharing", "layout", "segments", "share", "sources"]

KEY = "prefix_spans"
"""The batch's entry, passed on to every attention: for each segment the stretches (begin, end) of the row that stand before it."""
LEAST = 8
"""A shorter head is not worth the extra attention call's copies."""

Stretch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """What is computed of one document."""

    document: int
    """Which one, in the order given."""
    begin: int
    """Its first position that is computed here: so many tokens are shared."""
    end: int
    """Its length."""
    prefix: tuple[Stretch, ...]
    """Where in the row its first `begin` tokens are."""


def layout(documents: Sequence[list[Any]], limits: Sequence[int], least: int = LEAST) -> list[Segment]:
    """The row in which each common head of at least `least` tokens stands once, segment by segment.

    `limits`: how many first tokens of each document may be computed elsewhere. A document that is a head of another and predicts nothing
    has no segment at all.
    """
    found: list[Segment] = []
    before: list[Any] = []
    stretches: tuple[Stretch, ...] = ()
    at = 0
    for number in sorted(range(len(documents)), key=lambda place: documents[place]):
        tokens = documents[number]
        common = min(_common(before, tokens), limits[number])
        common = common if common >= least else 0
        prefix = _first(stretches, common)
        own = len(tokens) - common
        if own:
            found.append(Segment(number, common, len(tokens), prefix))
        before, stretches = tokens, (*prefix, (at, at + own)) if own else prefix
        at += own
    return found


def _common(one: list[Any], other: list[Any]) -> int:
    """How many first tokens are the same."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


def _first(stretches: Sequence[Stretch], count: int) -> tuple[Stretch, ...]:
    """The first `count` tokens of what the stretches hold."""
    kept: list[Stretch] = []
    for a, b in stretches:
        if count > 0:
            kept.append((a, min(b, a + count)))
            count -= b - a
    return tuple(kept)


def _limit(labels: Sequence[int]) -> int:
    """How many first tokens of a document may be shared: those before the one that predicts its first label."""
    first = next((place for place in range(1, len(labels)) if labels[place] != IGNORED), len(labels) + 1)
    return first - 1


# -------------------------------------------------------------------- batches


def segments(batch: Mapping[str, Any], least: int = LEAST) -> list[Segment]:
    """The :func:`layout` of a batch of :func:`byway.data.collate.pack_batch`."""
    bounds = list(pairwise(batch["cu_seq_lens_q"].tolist()))
    known = torch.stack([batch[name][0] for name in _columns(batch) if name != "labels"], dim=1).tolist()  # ids, positions, types
    labels = batch["labels"][0].tolist()
    return layout([known[a:b] for a, b in bounds], [_limit(labels[a:b]) for a, b in bounds], least)


def share(batch: dict[str, Any], least: int = LEAST) -> dict[str, Any]:
    """`batch` of :func:`byway.data.collate.pack_batch`, each common head once; itself where nothing is in common.

    The columns are a selection of the packed ones, so positions go on where the head ends. ``cu_seq_lens_q/k``: where segments begin.
    ``prefix_spans`` (:data:`KEY`): for each segment the stretches of the row before it. For causal models whose attention is ours
    (:func:`byway.engine.attention.packing.packing`); it refuses what cannot be shared.
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


def sources(found: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """(document, position), each (T,): what each token of the shared row is, for states that are kept by document."""
    documents = [torch.full((segment.end - segment.begin,), segment.document) for segment in found]
    return torch.cat(documents), torch.cat([torch.arange(segment.begin, segment.end) for segment in found])


def _columns(batch: Mapping[str, Any]) -> list[str]:
    """The entries with one number a token."""
    shape = batch["input_ids"].shape
    return [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape]


# -------------------------------------------------------------------- the plan


class Sharing:
    """What the rows of a run have in common: how many tokens are computed, and which rows go into one micro-batch."""

    def __init__(self, examples: Sequence[Example], least: int = LEAST) -> None:
        self.documents = [example.input_ids for example in examples]
        self.limits = [_limit(example.labels) for example in examples]
        self.least = least

    def layout(self, micro: Sequence[int]) -> list[Segment]:
        """What is computed of these rows in one micro-batch; documents by their place in `micro`."""
        return layout([self.documents[i] for i in micro], [self.limits[i] for i in micro], self.least)

    def tokens(self, micro: Sequence[int]) -> int:
        """Tokens that are computed for these rows in one micro-batch."""
        return sum(segment.end - segment.begin for segment in self.layout(micro))

    def saved(self, steps: Sequence[Step]) -> float:
        """The share of the rows' tokens that is not computed, in [0, 1)."""
        micros = [micro for step in steps for micro in step]
        real = sum(len(self.documents[i]) for micro in micros for i in micro)
        return 1 - sum(map(self.tokens, micros)) / real if real else 0.0

    def shared_tokens(self, steps: Sequence[Step]) -> int:
        """The usual (median) length of a head that is taken over; 0 where there is none."""
        found = sorted(s.begin for step in steps for micro in step for s in self.layout(micro) if s.begin)
        return found[len(found) // 2] if found else 0

    def rearranged(self, step: Step, limit: int) -> Step:
        """The rows of `step` in micro-batches of at most `limit` computed tokens, alike rows together; `step` itself where that saves none.

        As few as a walk through the rows in the order of their tokens finds, the largest as small as possible. A row that alone has more
        gets a micro-batch of its own.
        """
        rows = [i for micro in step for i in micro]
        heads = self._heads(rows)
        fewest = len(self._runs(heads, limit))
        low, high = 1, limit
        while low < high:
            middle = (low + high) // 2
            if len(self._runs(heads, middle)) <= fewest:
                high = middle
            else:
                low = middle + 1
        place = {index: position for position, index in enumerate(rows)}
        runs = tuple(tuple(sorted(run, key=place.__getitem__)) for run in self._runs(heads, high))
        return runs if sum(map(self.tokens, runs)) < sum(map(self.tokens, step)) else step

    def closest(self, count: int) -> list[int]:
        """`count` short rows that follow each other in the order of their tokens and share a head, one of them with labels; or none."""
        heads = [*self._heads(range(len(self.documents))).items()]
        length = {index: len(self.documents[index]) for index, _ in heads}
        pairs = [
            (length[one] + length[other], place)
            for place, ((one, _), (other, head)) in enumerate(pairwise(heads))
            if head and self.limits[other] < length[other]
        ]
        if not pairs:
            return []
        _, place = min(pairs)
        return [index for index, _ in heads[place : place + count]]

    def _heads(self, rows: Sequence[int]) -> dict[int, int]:
        """The rows in the order of their tokens → how many tokens each can take over from the one before it."""
        ordered = sorted(rows, key=lambda i: (self.documents[i], i))
        commons = [min(_common(self.documents[a], self.documents[b]), self.limits[b]) for a, b in pairwise(ordered)]
        return dict(zip(ordered, [0, *(common if common >= self.least else 0 for common in commons)], strict=True))

    def _runs(self, heads: Mapping[int, int], limit: int) -> list[list[int]]:
        runs: list[list[int]] = []
        room = 0
        for index, head in heads.items():
            length = len(self.documents[index])
            if not runs or length - head > room:
                runs.append([])
                room, head = limit, 0
            runs[-1].append(index)
            room -= length - head
        return runs
