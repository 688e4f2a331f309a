from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byway.data.batches import PER_BATCH, Step, plan_epoch
from byway.errors import ConfigError

lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 2000), st.integers(1, 600), st.booleans(), st.integers(0, 5))
def test_every_row_is_planned_once_and_no_limit_is_passed(lengths: list[int], per_step: int, micro: int, pack: bool, epoch: int) -> None:
    steps = plan_epoch(lengths, epoch=epoch, seed=3, tokens_per_step=per_step, micro_tokens=micro, pack=pack)
    assert sorted(index for step in steps for batch in step for index in batch) == list(range(len(lengths)))
    for step in steps:
        rows = [index for batch in step for index in batch]
        assert sum(lengths[index] for index in rows) <= per_step or len(rows) == 1
        for batch in step:
            size = sum(lengths[i] for i in batch) if pack else len(batch) * max(lengths[i] for i in batch)
            assert size <= micro or len(batch) == 1


@settings(max_examples=30, deadline=None)
@given(lengths_of, st.integers(1, 40), st.booleans())
def test_rows_per_step_is_exact_but_for_the_last(lengths: list[int], rows: int, pack: bool) -> None:
    steps = plan_epoch(lengths, epoch=0, seed=0, rows_per_step=rows, micro_tokens=400, pack=pack)
    counts = [sum(len(batch) for batch in step) for step in steps]
    assert counts[:-1] == [rows] * (len(counts) - 1) and 0 < counts[-1] <= rows


def test_plans_depend_on_seed_and_epoch_alone(seed: int) -> None:
    lengths = [random.Random(seed + index).randint(1, 400) for index in range(200)]

    def plan(epoch: int, seed: int) -> object:
        random.seed(epoch)
        return plan_epoch(lengths, epoch=epoch, seed=seed, tokens_per_step=2048, micro_tokens=1024, pack=True)

    assert plan(1, 7) == plan(1, 7)
    assert len({str(plan(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9
    code = (
        "from byway.data.batches import plan_epoch;"
        "print(plan_epoch(list(range(1, 40)), epoch=2, seed=5, rows_per_step=7, micro_tokens=90, pack=False))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hashes, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, check=True
        ).stdout
        for hashes in ("0", "1")
    }
    here = plan_epoch(list(range(1, 40)), epoch=2, seed=5, rows_per_step=7, micro_tokens=90, pack=False)
    assert runs == {f"{here}\n".encode()}


def test_micro_batches_are_few_even_and_waste_little(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [min(573, int(rng.lognormvariate(4.6, 0.9)) + 8) for _ in range(400)]
    packed = plan_epoch(lengths, epoch=0, seed=seed, tokens_per_step=8192, micro_tokens=2048, pack=True)
    for step in packed[:-1]:
        loads = [sum(lengths[i] for i in batch) for batch in step]
        assert len(loads) <= -(-sum(loads) // 2048) + 1
        assert max(loads) - min(loads) < 600
    padded = plan_epoch(lengths, epoch=0, seed=seed, tokens_per_step=8192, micro_tokens=2048, pack=False)
    in_order = [[tuple(range(start, min(start + 8, 400))) for start in range(0, 400, 8)]]
    planned, plain = (padding_share(lengths, [batch for step in steps for batch in step]) for steps in (padded, in_order))
    print(f"padding share: planned {planned:.3f}, eight rows as they come {plain:.3f}")
    assert planned < 0.35 * plain


def padding_share(lengths: list[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of positions that are padding when every batch is padded to its longest row."""
    positions = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1.0 - sum(lengths[index] for batch in batches for index in batch) / positions


def price_of(steps: list[Step], lengths: list[int], micro: int) -> int:
    """Positions of all batches, and what the passes themselves are reckoned at; those of a row longer than the limit too."""
    overhead = max(round(PER_BATCH * micro), 1)
    return sum(len(batch) * max(lengths[i] for i in batch) + overhead for step in steps for batch in step)


def cheapest(lengths: list[int], micro: int) -> int:
    """The least price over ALL ways to cut the sorted rows into runs, by trying every last run."""
    ordered, overhead = sorted(lengths, reverse=True), max(round(PER_BATCH * micro), 1)
    best = [0]
    for stop in range(1, len(ordered) + 1):
        fits = [
            best[start] + (stop - start) * ordered[start] + overhead
            for start in range(stop)
            if (stop - start) * ordered[start] <= micro or stop - start == 1
        ]
        best.append(min(fits))
    return best[-1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 400))
def test_padded_batches_cost_the_least_of_all_ways_to_cut_the_sorted_rows(lengths: list[int], micro: int) -> None:
    steps = plan_epoch(lengths, epoch=0, seed=0, rows_per_step=len(lengths), micro_tokens=micro, pack=False)
    assert price_of(steps, lengths, micro) == cheapest(lengths, micro)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(6, 14))
def test_no_grouping_of_rows_is_cheaper_than_cutting_the_sorted_ones(lengths: list[int], micro: int) -> None:
    """Sorting loses nothing: no way to part the rows, sorted or not, has a lower price."""

    def parts(rows: list[int]) -> Iterator[list[list[int]]]:
        if not rows:
            yield []
            return
        for others in parts(rows[1:]):
            yield [[rows[0]], *others]
            for i, other in enumerate(others):
                if (len(other) + 1) * max(*other, rows[0]) <= micro:
                    yield [*others[:i], [*other, rows[0]], *others[i + 1 :]]

    overhead = max(round(PER_BATCH * micro), 1)
    assert cheapest(lengths, micro) == min(sum(len(p) * max(p) + overhead for p in found) for found in parts(lengths))


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 600))
def test_packs_are_at_most_those_that_no_two_could_be_one(lengths: list[int], micro: int) -> None:
    """Any two packs together are more than `micro`, and the best fit's bound 11/9 of the fewest (+ 1) holds against the sum of tokens."""
    (step,) = plan_epoch(lengths, epoch=0, seed=0, rows_per_step=len(lengths), micro_tokens=micro, pack=True)
    loads = sorted(sum(lengths[i] for i in pack) for pack in step)
    assert len(loads) == 1 or len([load for load in loads if load <= micro]) <= 1 or sum(loads[:2]) > micro
    assert len([load for load in loads if load <= micro]) <= 2 * sum(n for n in lengths if n <= micro) / micro + 1


@settings(max_examples=40, deadline=None)
@given(lengths_of, st.integers(1, 600), st.integers(1, 40))
def test_which_rows_make_up_a_step_does_not_depend_on_packing(lengths: list[int], micro: int, rows: int) -> None:
    either: list[dict[str, Any]] = [{"rows_per_step": rows}, {"tokens_per_step": 50 * rows}]
    for size in either:
        plans = [plan_epoch(lengths, epoch=1, seed=2, micro_tokens=micro, pack=pack, **size) for pack in (True, False)]
        members = [[sorted(i for batch in step for i in batch) for step in plan] for plan in plans]
        assert members[0] == members[1]


def test_a_hundred_thousand_rows_are_planned_in_seconds(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [min(573, int(rng.lognormvariate(4.6, 0.9)) + 8) for _ in range(100_000)]
    for pack in (True, False):
        began = time.process_time()
        plan_epoch(lengths, epoch=0, seed=seed, rows_per_step=100_000, micro_tokens=1024, pack=pack)
        seconds = time.process_time() - began
        print(f"pack {pack}: {seconds:.2f} CPU seconds")
        assert seconds < 10, "quadratic in the number of rows it would be minutes"


def test_contradictory_sizes_are_refused() -> None:
    for sizes in ({}, {"tokens_per_step": 8, "rows_per_step": 8}, {"rows_per_step": 0}):
        with pytest.raises(ConfigError, match="_per_step"):
            plan_epoch([1, 2], epoch=0, seed=0, micro_tokens=8, pack=True, **sizes)
    assert plan_epoch([], epoch=0, seed=0, rows_per_step=2, micro_tokens=8, pack=True) == []
