"""The one validator of sections and methods: what it takes, the words of its errors, and its JSON schema."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

import byway
from byway import Method, SidePath, Site
from byway.core.fields import Count, Entry, Rank, described, json_schema, wrong
from byway.core.method import BuildContext, Frozen, Placement
from byway.errors import ConfigError, together


@dataclass(frozen=True)
class Part:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """A method with every kind of annotation that an author may write."""

    number: int = 1
    names: list[str] | None = None
    pair: tuple[int, int] = (1, 2)
    shares: Mapping[str, float] | None = None
    limited: Annotated[float, Field(gt=0)] = 1.0
    dtype: torch.dtype = torch.float32
    part: Part = Part()
    anything: Any = None

    def plan(self, model: nn.Module) -> Placement:
        return Placement([])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        raise NotImplementedError


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Toy(**values)
    return caught.value.message


def test_values_are_kept_as_given_and_cannot_change() -> None:
    toy = Toy(names=["a", "b"], pair=[3, 4], shares={"x": 1}, limited=2, dtype=torch.float64, part=Part(2), anything={"k": [1]})  # type: ignore[arg-type]
    assert toy.names == ("a", "b") and toy.pair == (3, 4) and toy.shares == {"x": 1} and toy.anything == {"k": (1,)}
    assert isinstance(toy.shares, Frozen) and hash(toy) == hash(replace(toy))
    assert type(toy.limited) is int and type(toy.shares["x"]) is int, "a file written from Python says 2, not 2.0"
    assert toy.dtype is torch.float64 and toy.part == Part(2)


def test_sets_ranges_and_numpy_floats_are_taken_and_numpy_integers_refused() -> None:
    lora = byway.LoRA(targets={"v_proj", "q_proj"}, layers=range(2), alpha=np.float64(2))  # type: ignore[arg-type]
    assert lora.targets == ("q_proj", "v_proj") and lora.layers == (0, 1) and type(lora.alpha) is float
    with pytest.raises(ConfigError, match="rank is"):
        byway.LoRA(rank=np.int64(4))  # type: ignore[arg-type]


def test_every_problem_is_named_at_once_down_to_the_entry() -> None:
    message = refused(number="1", names=["a", 5], shares={"x": "y"}, limited=0, dtype="float32", pair=[1])
    assert message.splitlines() == [
        "6 problems:",
        "  number is '1'; it must be an integer",
        "  names[1] is 5; it must be a string",
        "  pair is [1]; it must be tuple[int, int]",
        "  shares['x'] is 'y'; it must be a number",
        "  limited is 0; it must be a number > 0",
        "  dtype is 'float32'; it must be <class 'torch.dtype'>",
    ]
    assert refused(number=True) == "number is true; it must be an integer" and "names is 'a'" in refused(names="a")
    assert refused(names=list(range(100))).splitlines()[-1] == "  names has 97 more entries like these"


@pytest.mark.parametrize("value", [10**5000, [10**5000], {"x": -(10**5000)}], ids=["number", "list", "map"])
def test_an_integer_that_python_does_not_write_is_a_problem_like_others(value: Any) -> None:
    assert "is too long to be shown; it must be" in refused(names=value)
    assert "is too long to be shown; it must be" in refused(pair=value)


def test_a_method_from_a_console_is_checked_and_one_whose_types_are_unknown_is_refused() -> None:
    made: dict[str, Any] = {"__name__": "__main__"}
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "from tests.core.test_fields import Toy"]
    for name, annotation in (("Console", "int"), ("Unknown", "Nowhere")):
        lines += ["@dataclass(frozen=True, kw_only=True)", f"class {name}(Toy):", f"    more: {annotation} = 1"]
    exec("\n".join(lines), made)
    assert made["Console"](more=2).more == 2
    with pytest.raises(ConfigError, match="more is '2'; it must be an integer"):
        made["Console"](more="2")
    with pytest.raises(ConfigError, match=r"a field's type cannot be resolved.*Nowhere"):
        made["Unknown"]()


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Count | None, "an integer from 1 to 1,000,000,000 or null"),
        (Rank, "an integer from 1 to 65,536"),
        (Annotated[float, Field(ge=0, lt=1)], "a number ≥ 0 and < 1"),
        (str | int | Sequence[int | str] | None, "a string, an integer, a list of integers or strings, or null"),
        (Annotated[Sequence[Literal["a", "b"]], Field(min_length=1)], "a non-empty list of a or b"),
        (Annotated[Sequence[str], Field(min_length=2)], "a list of strings with at least 2 entries"),
        (Mapping[str, Sequence[bool]], "a map of strings to a list of booleans"),
        (Literal["auto"] | Annotated[str, Field(min_length=1)], "auto or a non-empty string"),
    ],
)
def test_an_annotation_in_words(annotation: Any, words: str) -> None:
    assert described(annotation) == words


@pytest.mark.parametrize("name", ["tasks", "methods"])
def test_an_entry_is_a_file_of_the_package_or_an_import_path(name: str) -> None:
    package = importlib.import_module(f"byway.{name}")
    entry = Entry(f"byway.{name}", apart=("task", "causal_lm"))
    assert entry.names() == package.names()
    annotation = Annotated[str, entry]
    assert not wrong(annotation, entry.names()[0]) and not wrong(annotation, "mypackage.toy:Toy")
    for value in ("mypackage.toy", "mypackage.toy:", "", 5, None, "task"):
        assert "or an import path" in wrong(annotation, value)[0][0]
    assert wrong(annotation, entry.names()[0] + "x")[0][1] == f"did you mean {entry.names()[0]!r}?"


def test_the_schema_has_the_limits_of_every_field() -> None:
    properties = json_schema(Toy)["properties"]
    assert properties["limited"] == {"type": "number", "exclusiveMinimum": 0, "default": 1.0}
    assert properties["names"]["anyOf"][0] == {"type": "array", "items": {"type": "string"}}


def test_several_problems_become_one_list_and_one_stays_as_it_is() -> None:
    assert together([("a", "b")]) == ("a", "b")
    assert together([("a", ""), ("b", "c")], "r.yaml") == ("2 problems in r.yaml:\n  a\n  b (c)", "")
