"""``lengths -> steps``: which rows make up which optimizer step, and how a step is cut into micro-batches that fit into memory.

A plan depends on the lengths, the seed and the epoch alone, never on ranks or on what ran before, so that a run can be resumed anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from byway.errors import ConfigError

__all__ = ["MicroBatch", "Step", "padding_share", "plan_epoch"]

MicroBatch = tuple[int, ...]
"""Indices of the examples of one forward pass."""
Step = tuple[MicroBatch, ...]
"""The forward passes of one optimizer step."""


def plan_epoch(
    lengths: Sequence[int],
    *,
    epoch: int,
    seed: int,
    tokens_per_step: int | None = None,
    rows_per_step: int | None = None,
    micro_tokens: int,
    pack: bool,
) -> list[Step]:
    """The steps of one epoch; every example is in exactly one micro-batch.

    `lengths`: tokens of each example. `tokens_per_step`: real tokens a step, exceeded only by an example that alone has more;
    `rows_per_step`: examples a step (exactly one of the two is given; the last step may be smaller). `micro_tokens`: tokens a micro-batch:
    their sum when packed (`pack`), rows × longest when padded; an example that alone has more gets a micro-batch of its own.
    """
    if (tokens_per_step is None) == (rows_per_step is None):
        raise ConfigError("exactly one of train.tokens_per_step and train.rows_per_step is needed")
    for name, value in (("tokens_per_step", tokens_per_step), ("rows_per_step", rows_per_step), ("micro_tokens", micro_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    order = list(range(len(lengths)))
    random.Random(f"byway epoch {epoch} seed {seed}").shuffle(order)
    if rows_per_step is not None:
        groups = [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]
    else:
        groups = _by_tokens(order, lengths, tokens_per_step or 0)
    cut = _packed if pack else _padded
    return [cut(group, lengths, micro_tokens) for group in groups]


def padding_share(lengths: Sequence[int], steps: Iterable[Step]) -> float:
    """The share of positions that would be padding if every micro-batch were padded to its longest row; 0 for an empty plan."""
    batches = [batch for step in steps for batch in step]
    positions = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1.0 - sum(lengths[index] for batch in batches for index in batch) / positions if positions else 0.0


def _by_tokens(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive groups of at most `limit` tokens."""
    groups: list[list[int]] = []
    room = -1
    for index in order:
        if lengths[index] > room:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def _packed(group: Sequence[int], lengths: Sequence[int], limit: int) -> Step:
    """As few packs as first-fit-decreasing finds, evened out."""
    ordered = sorted(group, key=lambda index: -lengths[index])
    fitted = _first_fit(ordered, lengths, limit)
    even: list[list[int]] = [[] for _ in fitted]
    loads = [0] * len(fitted)
    for index in ordered:
        target = loads.index(min(loads))
        even[target].append(index)
        loads[target] += lengths[index]
    fits = all(load <= limit or len(pack) == 1 for load, pack in zip(loads, even, strict=True))
    packs = even if fits else fitted
    place = {index: position for position, index in enumerate(group)}
    return tuple(tuple(sorted(pack, key=place.__getitem__)) for pack in packs)


def _first_fit(ordered: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in ordered:
        length = lengths[index]
        target = next((number for number, room in enumerate(rooms) if room >= length), None)
        if target is None:
            packs.append([])
            rooms.append(limit)
            target = len(packs) - 1
        packs[target].append(index)
        rooms[target] -= length
    return packs


def _padded(group: Sequence[int], lengths: Sequence[int], limit: int) -> Step:
    """Rows of similar length together; as few batches as `limit` allows, the largest of them as small as possible."""
    alone = [index for index in group if lengths[index] > limit]
    ordered = sorted((index for index in group if lengths[index] <= limit), key=lambda index: -lengths[index])
    fewest = len(_runs(ordered, lengths, limit))
    low, high = lengths[ordered[0]] if ordered else limit, limit
    while low < high:
        middle = (low + high) // 2
        if len(_runs(ordered, lengths, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return (*((index,) for index in alone), *(tuple(run) for run in _runs(ordered, lengths, high)))


def _runs(ordered: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Greedy runs of rows, longest first, each of at most `limit` positions when padded."""
    runs: list[list[int]] = []
    for index in ordered:
        if not runs or (len(runs[-1]) + 1) * lengths[runs[-1][0]] > limit:
            runs.append([])
        runs[-1].append(index)
    return runs
