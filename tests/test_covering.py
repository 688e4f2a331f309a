"""Covering samples keep every method and every family of every law, and the seed alone decides about the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from byway import methods
from tests.conftest import DRAWN
from tests.covering import covering, sampled, values
from tests.methods.cases import PAIRS
from tests.tiny import FAMILIES


def drawn(cases: list[tuple[str, ...]], seed: int, times: int = 1) -> list[tuple[str, ...]]:
    return [cases[i] for i in covering(cases, seed, times)]


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_method_and_every_family_occurs(seed: int, times: int) -> None:
    names, families = zip(*drawn(PAIRS, seed, times), strict=True)
    for name in methods.names():
        assert names.count(name) >= times
    for family in FAMILIES:
        assert families.count(family) >= times
    assert len(names) <= times * max(len(methods.names()), len(FAMILIES)) + 4


def test_a_value_with_few_cases_keeps_them_all() -> None:
    cases = [("a", "x"), ("b", "x"), ("c", "x"), ("c", "y")]
    assert drawn(cases, seed=0, times=2) == cases


def test_the_seed_decides_and_the_order_of_the_cases_is_kept() -> None:
    samples = [drawn(PAIRS, seed) for seed in range(20)]
    assert len({tuple(sample) for sample in samples}) == 20
    assert samples == [drawn(PAIRS, seed) for seed in range(20)]
    assert all(sample == [pair for pair in PAIRS if pair in sample] for sample in samples)


def item(nodeid: str, mark: pytest.MarkDecorator | None, **params: Any) -> Any:
    return SimpleNamespace(
        nodeid=nodeid, callspec=SimpleNamespace(params=params), get_closest_marker=lambda name: None if mark is None else mark.mark
    )


def test_only_marked_tests_are_sampled_and_each_function_by_itself() -> None:
    mark = pytest.mark.covering_sample(("name", "way"), "family")
    items = [
        item(f"t.py::{test}[{name}-{family}-{way}]", mark, name=name, family=family, way=way)
        for test in ("one", "two")
        for name, family in PAIRS
        for way in "ab"
    ]
    items.append(item("t.py::three", None))
    found: Any = sampled(items, seed=1)
    assert list(found) == ["t.py::one", "t.py::two"]
    ids = []
    for name, (cases, kept) in found.items():
        assert {case.nodeid for case in cases} == {i.nodeid for i in items if i.nodeid.startswith(name)}
        combinations = {(case.callspec.params["name"], case.callspec.params["way"]) for case in kept}
        assert combinations == {(name, way) for name in methods.names() for way in "ab"}
        assert {case.callspec.params["family"] for case in kept} == set(FAMILIES)
        ids.append([case.nodeid.partition("[")[2] for case in kept])
    assert ids[0] != ids[1], "each law draws its own sample"


def test_in_this_run_every_sampled_test_keeps_every_value(request: pytest.FixtureRequest) -> None:
    for name, (cases, kept) in request.config.stash[DRAWN].items():
        for all_of_axis, kept_of_axis in zip(*(zip(*map(values, items), strict=True) for items in (cases, kept)), strict=True):
            assert set(all_of_axis) == set(kept_of_axis), name
