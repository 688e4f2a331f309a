"""``lengths -> steps``: which rows make up which optimizer step, and how a step is cut into micro-batches that fit into memory.

A plan depends on the lengths, the seed and the epoch alone, never on ranks or on what ran before, so that a run can be resumed anywhere.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heapreplace
from itertools import pairwise

from byway.errors import ConfigError

__all__ = ["MicroBatch", "Step", "padding_share", "plan_epoch"]

MicroBatch = tuple[int, ...]
"""Indices of the examples of one forward pass."""
Step = tuple[MicroBatch, ...]
"""The forward passes of one optimizer step."""

PER_BATCH = 1 / 32
"""What a forward pass costs beside its positions, as a share of those of the largest: padding is traded against more, smaller passes."""


def plan_epoch(
    lengths: Sequence[int],
    *,
    epoch: int,
    seed: int,
    tokens_per_step: int | None = None,
    rows_per_step: int | None = None,
    micro_tokens: int,
    pack: bool,
    rearrange: Callable[[Step, int], Step] | None = None,
) -> list[Step]:
    """The steps of one epoch; every example is in exactly one micro-batch.

    `lengths`: tokens of each example. `tokens_per_step`: real tokens a step, exceeded only by an example that alone has more;
    `rows_per_step`: examples a step (exactly one of the two is given; the last step may be smaller). `micro_tokens`: tokens a micro-batch:
    their sum when packed (`pack`), rows × longest when padded; an example that alone has more gets a micro-batch of its own.
    `rearrange`: (a step, `micro_tokens`) → the same examples in other micro-batches.
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
    steps = [cut(group, lengths, micro_tokens) for group in groups]
    return steps if rearrange is None else [rearrange(step, micro_tokens) for step in steps]


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
    """As few packs as best-fit-decreasing finds, evened out; an example longer than `limit` is alone."""
    ordered = sorted(group, key=lambda index: -lengths[index])
    alone = next((number for number, index in enumerate(ordered) if lengths[index] <= limit), len(ordered))
    fitted = _best_fit(ordered[alone:], lengths, limit)
    even = _evened(ordered[alone:], lengths, len(fitted))
    packs = even if all(sum(lengths[index] for index in pack) <= limit for pack in even) else fitted
    place = {index: position for position, index in enumerate(group)}
    return tuple(tuple(sorted(pack, key=place.__getitem__)) for pack in ([index] for index in ordered[:alone])) + tuple(
        tuple(sorted(pack, key=place.__getitem__)) for pack in packs
    )


def _best_fit(ordered: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Each example, longest first, into the pack with the least room that holds it; O(n log limit)."""
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room → the packs that have just that
    rooms: list[int] = []  # those that occur, ascending
    for index in ordered:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            target = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, target = limit, len(packs)
            packs.append([])
        packs[target].append(index)
        left = room - length
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(target)
    return packs


def _evened(ordered: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` packs of about the same size: each example, longest first, into the one that holds least."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]  # a heap
    for index in ordered:
        load, target = loads[0]
        packs[target].append(index)
        heapreplace(loads, (load + lengths[index], target))
    return packs


def _padded(group: Sequence[int], lengths: Sequence[int], limit: int) -> Step:
    """Rows of similar length together: batches of at most `limit` positions with the least Σ (positions + :data:`PER_BATCH` · limit)."""
    ordered = sorted(group, key=lambda index: -lengths[index])
    alone = next((number for number, index in enumerate(ordered) if lengths[index] <= limit), len(ordered))
    cuts = _cuts([lengths[index] for index in ordered[alone:]], limit, max(round(PER_BATCH * limit), 1))
    runs = [ordered[alone + start : alone + stop] for start, stop in pairwise(cuts)]
    return (*((index,) for index in ordered[:alone]), *(tuple(run) for run in runs))


def _cuts(lengths: Sequence[int], limit: int, overhead: int) -> list[int]:
    """Where to cut `lengths` (descending, none above `limit`) so that Σ over the runs of (rows · longest + overhead) is least.

    cost[j] = min over i of cost[i] + (j − i) · lengths[i] + overhead, with (j − i) · lengths[i] ≤ limit. With that limit as an infinite
    price the prices have Monge's property, so the best i only grows with j: each new i is best from some j on, found by bisection.
    O(n log n).
    """
    count = len(lengths)
    cost, came = [0] * (count + 1), [0] * (count + 1)

    def price(i: int, j: int) -> float:
        positions = (j - i) * lengths[i]
        return cost[i] + positions + overhead if positions <= limit else math.inf

    best: deque[tuple[int, int]] = deque([(0, 1)])  # (i, the first j for which it is best)
    for j in range(1, count + 1):
        while len(best) > 1 and best[1][1] <= j:
            best.popleft()
        i = best[0][0]
        cost[j], came[j] = int(price(i, j)), i
        if j < count:
            _offer(best, j, count, price)
    cuts = [count]
    while cuts[-1]:
        cuts.append(came[cuts[-1]])
    return cuts[::-1]


def _offer(best: deque[tuple[int, int]], new: int, count: int, price: Callable[[int, int], float]) -> None:
    """Let `new` take the ends from which on it is cheaper than those in `best`."""
    first = count + 1
    while best:
        old, start = best[-1]
        start = max(start, new + 1)
        if price(new, start) <= price(old, start):
            first = start
            best.pop()
            continue
        if first <= count or price(new, count) <= price(old, count):
            low, high = start, min(first, count)  # at low the old one is cheaper, at high the new one is
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if price(new, middle) <= price(old, middle) else (middle, high)
            first = high
        break
    if first <= count:
        best.append((new, first))
