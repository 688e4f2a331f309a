"""Covering samples: a few cases of a large matrix, drawn from a seed, in which every value of every axis occurs."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

DEFAULT_SEED = 20261122


def seed_of_the_tests() -> int:
    """Return the seed of inputs and samples: BYWAY_TEST_SEED, or the same one every time."""
    return int(os.environ.get("BYWAY_TEST_SEED", DEFAULT_SEED))


def covering(cases: Sequence[Sequence[Hashable]], seed: int | str, times: int = 1) -> list[int]:
    """Return the positions of a sample of `cases` in which each value occurs `times` times, or as often as in `cases`.

    Greedy: add the case with the most values still missing, then the one whose values were drawn least; the seed decides
    between equals.

    Args:
        cases: one value per axis each, for example (method, family).
        seed: seed of the draw; equal seeds give equal samples in every process.
        times: minimum number of cases per value.
    """
    wanted = {value: min(times, count) for value, count in Counter(v for case in cases for v in enumerate(case)).items()}
    left = list(range(len(cases)))
    random.Random(seed).shuffle(left)
    chosen: list[int] = []
    drawn: Counter[tuple[int, Hashable]] = Counter()

    def rank(i: int) -> tuple[int, int]:
        case = list(enumerate(cases[i]))
        return sum(drawn[value] < wanted[value] for value in case), -sum(drawn[value] for value in case)

    while any(drawn[value] < count for value, count in wanted.items()):
        chosen.append(max(left, key=rank))
        left.remove(chosen[-1])
        drawn.update(enumerate(cases[chosen[-1]]))
    return sorted(chosen)


def sampled(items: Sequence[pytest.Item], seed: int) -> dict[str, tuple[list[pytest.Item], list[pytest.Item]]]:
    """Return {test function: (its cases, the drawn ones)} of the tests marked ``covering_sample``."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering_sample"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    found = {}
    for name, cases in functions.items():
        mark = cases[0].get_closest_marker("covering_sample")
        assert mark is not None
        drawn = covering([values(case) for case in cases], f"{seed} {name}", **mark.kwargs)
        found[name] = (cases, [cases[i] for i in drawn])
    return found


def values(item: pytest.Item) -> list[Hashable]:
    """Return the values of a test on its axes: the marker's arguments (parameters, or tuples of them), or all."""
    mark = item.get_closest_marker("covering_sample")
    parameters = item.callspec.params  # pyright: ignore[reportAttributeAccessIssue]
    axes = (mark.args if mark else ()) or sorted(parameters)
    return [tuple(parameters[p] for p in ((axis,) if isinstance(axis, str) else axis)) for axis in axes]
