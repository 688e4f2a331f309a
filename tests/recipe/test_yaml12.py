"""YAML 1.2 scalars, and everything a hostile or broken file can be (checks 2-7)."""

from __future__ import annotations

import math
import resource
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byway.errors import ConfigError
from byway.recipe.yaml12 import MAX_BYTES, dump, parse, parse_value


def read(text: str | bytes) -> object:
    return parse(text if isinstance(text, bytes) else text.encode(), "r.yaml").value


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return str(caught.value)


# What the core schema of YAML 1.2.2 (§10.3.2) says.
SCALARS = [
    ("1e-4", 1e-4), ("2E+3", 2000.0), (".5", 0.5), ("5.", 5.0), ("-0.0", -0.0), ("12", 12), ("-7", -7), ("+3", 3), ("012", 12),
    ("0o17", 15),
    ("0x1F", 31), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), (".inf", math.inf), ("-.INF", -math.inf),
    ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("on", "on"), ("y", "y"), ("1_000", "1_000"), ("12:30", "12:30"), ("0b11", "0b11"),
    ("2026-01-01", "2026-01-01"), ("1e", "1e"), ("1.2.3", "1.2.3"), ("'1'", "1"), ('"true"', "true"), ("<<", "<<"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = parse_value(text, "x")
    assert found == value and type(found) is type(value)


def test_nan_is_nan() -> None:
    assert math.isnan(read("a: .nan")["a"])  # type: ignore[index]


def test_a_duplicate_key_names_both_lines() -> None:
    assert "r.yaml:3:1: the key 'r' stands here and on line 1" in refusal("r: 4\nalpha: 3\nr: 8")


def test_a_duplicate_key_in_a_flow_mapping_or_of_another_type_is_one_too() -> None:
    assert "the key 'a'" in refusal("{a: 1, 'a': 2}")
    assert "the key '1'" in refusal("1: x\n'1': y")


def test_an_object_tag_is_refused_and_nothing_runs(tmp_path: object) -> None:
    marker = f"{tmp_path}/ran"
    assert "!!python/object/apply:os.system" in refusal(f"a: !!python/object/apply:os.system ['touch {marker}']")
    import os

    assert not os.path.exists(marker)


def test_plain_tags_are_kept() -> None:
    assert read("a: !!str 5\nb: !!float 5\nc: !!int '5'") == {"a": "5", "b": 5.0, "c": 5}
    assert "does not fit" in refusal("a: !!int x")


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
        "".join(f"a{i}: &a{i} {'[' * 30}{f'*a{i - 1}' if i else 'x'}{']' * 30}\n" for i in range(500)),
        "[" * 3000 + "]" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        "a: x\n" * (20 * 2**20 // 5),
        "a: &x [1, *x]",
        "a: *x",
    ],
    ids=["alias bomb", "deep through aliases", "deep list", "deep mapping", "deep block", "20 MB", "alias in itself", "alias of nothing"],
)
def test_bombs_are_refused_quickly_and_in_little_memory(text: str) -> None:
    data = text.encode()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refusal(data)
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_the_longest_recipe_allowed_is_read_in_seconds() -> None:
    text = "\n".join(f"k{i}: [1, 2e-4, abc, {{a: b}}]" for i in range(3000))[:MAX_BYTES].rsplit("\n", 1)[0]
    began = time.process_time()
    assert len(read(text)) > 2000  # type: ignore[arg-type]
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a:\n\tb: 1", "r.yaml:2:1: a tab"),
        ("a: 1\nb: \0", "r.yaml:2:4: character U+0000"),
        ("a: 'x".encode("utf-16"), "r.yaml:1:1: the file is UTF-16"),
        (b"a: 1\nb: \xff", "r.yaml:2:4: byte 0xff"),
        ("a: b: c", "r.yaml:1:5"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1: a second document"),
        ("a: [1", "r.yaml:1:6"),
        ("? [a]\n: b", "a list or mapping cannot be a key"),
    ],
)
def test_what_is_no_yaml_says_where(text: str | bytes, where: str) -> None:
    assert where in refusal(text)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    document = parse(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n", "r.yaml")
    assert document.value == {"a": 1, "b": {"c": "x"}}
    assert document.lines["b", "c"] == 3


def test_lines_are_known_for_keys_and_items() -> None:
    assert parse(b"a: 1\nm:\n  - {x: 1}\n  - x: 2\n    y: 3\n", "r").lines[("m", 1, "y")] == 5


def test_an_alias_is_a_copy() -> None:
    value = read("a: &x [1]\nb: *x")
    assert value == {"a": [1], "b": [1]} and value["a"] is not value["b"]  # type: ignore[index]


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.x_1", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine, not a wasteful strategy
@given(st.dictionaries(st.sampled_from(["a", "b", "off", "1e5"]), plain_values, max_size=3))
def test_what_is_written_reads_back_equal(value: dict[str, object]) -> None:
    assert read(dump(value)) == value


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_stays_text_for_a_yaml_1_1_reader_too(text: str) -> None:
    assert yaml.safe_load(dump({"a": text})) == {"a": text}


@given(st.text("ab:-[]{}&*!'\"\n #1.e\t,?|>%@`~", max_size=40))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        read(text)
    except ConfigError as error:
        assert error.message.startswith("r.yaml:")


def test_a_character_that_json_writes_as_two_escapes_is_one() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00", "b": "\\ud83d"}', "r.yaml").value == {"a": "\U0001f600", "b": "\ud83d"}
