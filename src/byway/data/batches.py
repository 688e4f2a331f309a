"""``lengths -> steps``: the rows of each optimizer step, cut into micro-batches that fit into memory.

A plan depends on the lengths, the seed and the epoch alone, never on ranks or earlier steps, so that a run can be
resumed anywhere.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapreplace
from itertools import pairwise

from byway.errors import ConfigError

__all__ = ["MicroBatch", "Step", "plan_epoch"]

MicroBatch = tuple[int, ...]
"""Indices of the examples of one forward pass."""
Step = tuple[MicroBatch, ...]
"""The forward passes of one optimizer step."""

PER_BATCH = 1 / 32
"""Fixed cost of a forward pass, as a share of the positions of the largest: padding is weighed against more passes."""


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
    """Return the steps of one epoch; every example is in exactly one micro-batch.

    Args:
        lengths: tokens of each example.
        tokens_per_step: tokens per step, without padding; exceeded only by an example that has more by itself.
        rows_per_step: examples per step, instead of `tokens_per_step`. The last step may be smaller either way.
        micro_tokens: tokens per micro-batch: their sum if packed, rows × longest if padded; a longer example is alone.
        pack: True for packed micro-batches.
        rearrange: (a step, `micro_tokens`) → the same examples in other micro-batches.

    Raises:
        ConfigError: not exactly one of `tokens_per_step` and `rows_per_step` is given, or a size is below 1.
    """
    if (tokens_per_step is None) == (rows_per_step is None):
        raise ConfigError("set exactly one of train.tokens_per_step and train.rows_per_step")
    for name, value in (("tokens_per_step", tokens_per_step), ("rows_per_step", rows_per_step), ("micro_tokens", micro_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    order = list(range(len(lengths)))
    random.Random(f"byway epoch {epoch} seed {seed}").shuffle(order)
    if rows_per_step is not None:
        groups = [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]
    else:
        groups, room = [], -1
        for index in order:  # consecutive groups of at most tokens_per_step tokens
            if lengths[index] > room:
                groups.append([])
                room = tokens_per_step or 0
            groups[-1].append(index)
            room -= lengths[index]
    steps = [_micro_batches(group, lengths, micro_tokens, pack) for group in groups]
    return steps if rearrange is None else [rearrange(step, micro_tokens) for step in steps]


def _micro_batches(group: Sequence[int], lengths: Sequence[int], limit: int, pack: bool) -> Step:
    """Return the micro-batches of one step; an example longer than `limit` gets its own.

    Packed: as few as best-fit-decreasing finds, evened out. Padded: rows of similar length together, at most `limit`
    positions per batch, least Σ (positions + PER_BATCH · limit).
    """
    ordered = sorted(group, key=lambda index: -lengths[index])
    alone = next((number for number, index in enumerate(ordered) if lengths[index] <= limit), len(ordered))
    single, ordered = [(index,) for index in ordered[:alone]], ordered[alone:]
    if not pack:
        cuts = _cuts([lengths[index] for index in ordered], limit, max(round(PER_BATCH * limit), 1))
        return (*single, *(tuple(ordered[start:stop]) for start, stop in pairwise(cuts)))
    fitted = _best_fit(ordered, lengths, limit)
    even: list[list[int]] = [[] for _ in fitted]
    loads = [(0, number) for number in range(len(even))]  # a heap
    for index in ordered:  # each example, longest first, goes into the smallest pack
        load, target = loads[0]
        even[target].append(index)
        heapreplace(loads, (load + lengths[index], target))
    packs = even if all(sum(lengths[index] for index in pack) <= limit for pack in even) else fitted
    place = {index: position for position, index in enumerate(group)}
    return (*single, *(tuple(sorted(pack, key=place.__getitem__)) for pack in packs))


def _best_fit(ordered: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Put each example, longest first, into the fullest pack that has room for it; O(n log limit)."""
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room → the packs with exactly that room
    rooms: list[int] = []  # the keys of with_room, ascending
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


def _cuts(lengths: Sequence[int], limit: int, overhead: int) -> list[int]:
    """Cut `lengths` (descending, none above `limit`) so that Σ over the runs of (rows · longest + overhead) is least.

    cost[j] = min over i of cost[i] + (j − i) · lengths[i] + overhead, with (j − i) · lengths[i] ≤ limit. If a run above
    the limit costs infinitely much, the costs have the Monge property, so the best i only grows with j: each new i is
    best from some j on, which bisection finds. O(n log n).
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
    """Add `new` to `best`, from the first j on for which it is cheaper than the entries there."""
    first = count + 1
    while best:
        old, start = best[-1]
        start = max(start, new + 1)
        if price(new, start) <= price(old, start):
            first = start
            best.pop()
            continue
        if first <= count or price(new, count) <= price(old, count):
            low, high = start, min(first, count)  # at low the old one is cheaper, at high the new one
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if price(new, middle) <= price(old, middle) else (middle, high)
            first = high
        break
    if first <= count:
        best.append((new, first))
