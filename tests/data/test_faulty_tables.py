"""Rows as tables hold them: nulls of Arrow, empty and padded labels, numbers of classes, flags of turns, and what a user did not mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import byway
from byway.data.documents import Conversation, Labelled
from byway.data.formats import read_documents
from byway.data.labelled import _are_names, _index, class_names, suspicious
from byway.data.messages import as_messages
from byway.data.rows import read_rows
from byway.errors import DataError
from byway.recipe.sections import Data
from byway.tasks.classification import Classification

CALLS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        ],
        "tools": [{"function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "weather", "name": "Ada"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
        ],
        "tools": [{"function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
    },
]


def sources(tmp_path: Path) -> dict[str, Any]:
    table = pyarrow.Table.from_pylist(CALLS)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CALLS))
    return {"parquet": tmp_path / "rows.parquet", "dataset": datasets.Dataset.from_list(CALLS), "jsonl": tmp_path / "rows.jsonl"}


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_nulls_that_arrow_adds_are_absent_at_every_depth(kind: str, tmp_path: Path) -> None:
    there = sources(tmp_path)
    assert there[kind] is not None
    plain, arrow = (read_documents(there[name]).items for name in ("jsonl", kind))
    assert [(d.messages, d.tools) for d in arrow if isinstance(d, Conversation)] == [
        (d.messages, d.tools) for d in plain if isinstance(d, Conversation)
    ]
    (first, *_) = arrow
    assert isinstance(first, Conversation)
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_a_null_that_a_json_row_holds_stays(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [_call({"a": None})]}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (document,) = read_documents(tmp_path / "rows.jsonl").items
    assert isinstance(document, Conversation)
    assert document.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


def labels(tmp_path: Path, name: str, text: str) -> list[Any]:
    (tmp_path / name).write_text(text)
    return [d.label for d in read_documents(tmp_path / name, format="classification").items if isinstance(d, Labelled)]


def test_white_space_around_a_label_makes_no_class(tmp_path: Path) -> None:
    assert labels(tmp_path, "a.csv", "text,label\nx, pos\ny,pos\nz,neg \n") == ["pos", "pos", "neg"]
    assert labels(tmp_path, "a.tsv", "text\tlabel\nx\tpos \ny\tneg\n") == ["pos", "neg"]
    assert labels(tmp_path, "a.jsonl", '{"text": "x", "label": " pos"}\n') == ["pos"]


@pytest.mark.parametrize("cell", ["", "  ", "\t"])
def test_an_empty_label_is_a_bad_row_and_no_class(cell: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: has no label: it is empty"):
        labels(tmp_path, "a.csv", f"text,label\nx,pos\nok,{cell}\ny,neg\n")


def test_labels_that_are_missing_in_a_table_of_numbers_are_bad_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: label nan is neither an integer nor a name"):
        read_documents(tmp_path / "a.parquet", format="classification")


def recipe(base: Path, tmp_path: Path, **data: Any) -> dict[str, Any]:
    return {
        "base": {"model": str(base), "device": "cpu"},
        "method": {"name": "lora", "rank": 2},
        "data": {"train": str(tmp_path / "a.csv"), "task": "classification", **data},
        "train": {"max_steps": 1, "rows_per_step": 4, "threads": 1},
        "output": str(tmp_path / "run"),
    }


def test_numbers_of_classes_in_a_table_can_be_given_names(tmp_path: Path) -> None:
    rows = read_documents(_written(tmp_path, "text,label\nx,0\ny,1\n"), format="classification").items
    assert class_names([row for row in rows if isinstance(row, Labelled)]) == ("0", "1")
    assert [_index(row.label, ("negative", "positive")) for row in rows if isinstance(row, Labelled)] == [0, 1]
    assert [_index(row.label, ("1", "0")) for row in rows if isinstance(row, Labelled)] == [1, 0], "names, where they are numbers"


def _written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "a.csv").write_text(text)
    return tmp_path / "a.csv"


def test_the_same_numbers_as_text_and_as_numbers_are_one_class() -> None:
    rows = [Labelled(texts=("a",), label=label) for label in (0, "1", "0", 1)]
    assert class_names(rows) == ("0", "1")


def classified(tmp_path: Path, rows: list[Any], **data: Any) -> Classification:
    lines = [json.dumps({"text": f"w{number}", "label": label}) for number, label in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return Classification(Data(train=str(tmp_path / "rows.jsonl"), task="classification", **data), seed=0)


def test_a_number_far_beyond_any_class_makes_no_million_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2 has the label 99999999; .* 100,000,000 classes"):
        classified(tmp_path, [0, 99999999])


@pytest.mark.parametrize("name", [" neg", "neg ", "", " "])
def test_names_given_for_classes_have_no_white_space_around(name: str, tmp_path: Path) -> None:
    with pytest.raises(byway.ConfigError, match="white space around a name does not count"):
        classified(tmp_path, ["neg", "pos"], labels=(name, "pos"))


@pytest.mark.parametrize("names", [("Pos", "pos"), ("very  good", "very good"), ("neg", "neg\u200b"), ("stra\u00dfe", "STRASSE")])
def test_classes_that_look_alike_are_reported(names: tuple[str, str]) -> None:
    assert suspicious(("other", *names)) == [f"classes that differ only in case or white space: {', '.join(map(ascii, names))}"]


def test_a_class_that_is_a_missing_value_is_reported() -> None:
    assert suspicious(("nan", "neg", "pos")) == ["the class 'nan' looks like a missing label"]
    assert suspicious(("neg", "pos")) == []


@pytest.mark.parametrize("label", ["1", "1.0"])
def test_a_table_writes_the_number_of_a_class_with_or_without_a_point(label: str) -> None:
    assert _index(label, ("negative", "positive")) == 1
    assert class_names([Labelled(texts=("a",), label=0), Labelled(texts=("a",), label=label)]) == ("0", "1")


def test_numbers_that_are_names_of_classes_are_not_taken_for_indices() -> None:
    assert _are_names([1, 2], ("1", "2"), "rows"), "2 is no index: 1 and 2 are the names, as text in the rows that named them"
    assert not _are_names([0, 4], ("1", "2", "3", "4", "5"), "rows"), "0 is no name: they are indices"
    assert not _are_names([0, 1], ("0", "1"), "rows")
    assert not _are_names([0, 1], ("no", "yes"), "rows")
    with pytest.raises(DataError, match="the labels 1 are names of classes, and also the indices of others"):
        _are_names([1], ("1", "2"), "rows")


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize("value", [0, False])
def test_flags_of_other_programs_take_a_turn_out_of_the_loss(flag: str, value: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", flag: value}, {"role": "assistant", "content": "c"}]
    messages, unweighted = as_messages(turns, "messages")
    assert unweighted == {1}
    assert all(set(message) == {"role", "content"} for message in messages)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": "b", "weight": 0.5}, "has the weight 0.5; it must be 0 or 1"),
        ({"role": "assistant", "content": "b", "train": "no"}, "has the train 'no'"),
        ({"role": "user", "content": "b", "loss": True}, "only the assistant's turns can be in the loss"),
        ({"role": "assistant", "content": "b", "loss": True, "train": False}, "contradictory flags"),
        ({"role": "assistant", "content": "b", "train_detail": [{"begin_offset": 0}]}, "only be in the loss as a whole"),
    ],
)
def test_flags_that_cannot_be_honoured_are_bad_rows(turn: dict[str, Any], message: str) -> None:
    from byway.data.bad_rows import BadRow

    with pytest.raises(BadRow, match=message):
        as_messages([turn], "messages")


@pytest.mark.parametrize(
    ("name", "text", "message", "hint"),
    [
        ("a.csv", '"text";"label"\n"x, y";"pos"\n', "separated by ';'", "sep=';'"),
        ("a.csv", "\n\ntext|label\nx|pos\n", r"a\.csv:3: the header 'text|label' is one column", "sep='|'"),
        ("a.csv", "text;label\nx;pos\n", "separated by ';'", "commas"),
        ("a.tsv", "text,label\nx,pos\n", "separated by ','", "tabs"),
        ("a.csv", ",text,label\n0,x,pos\n", "a column without a name", "index=False"),
        ("a.jsonl", '{"text": "x", "text": "y"}\n', "has the key 'text' twice in one object", ""),
        ("a.json", '[{"text": "x", "text": "y"}]', "has the key 'text' twice in one object", ""),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x", "content": "y"}]}\n', "has the key 'content' twice", ""),
    ],
)
def test_what_a_user_did_not_mean_is_named(name: str, text: str, message: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_rows(tmp_path / name)
    assert hint in raised.value.hint


def test_a_key_twice_in_json_inside_a_cell_is_named(tmp_path: Path) -> None:
    cell = '[{"role": "user", "content": "x", "content": "y"}]'
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": cell}) + "\n")
    with pytest.raises(DataError, match=r"messages is text that has the key 'content' twice in one object"):
        read_documents(tmp_path / "a.jsonl")


def test_white_space_around_the_names_of_columns_does_not_count(tmp_path: Path) -> None:
    assert labels(tmp_path, "a.csv", "text, label\nx, pos\ny,neg\n") == ["pos", "neg"]


@pytest.mark.parametrize(
    ("prompt", "completion", "message"), [("1 + 1", 2, "completion is 2"), (7, "x", "prompt is 7"), ("x", True, "is true")]
)
def test_a_prompt_or_completion_that_is_no_text_says_how_to_write_it(prompt: Any, completion: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    with pytest.raises(DataError, match=f"{message}, not text: write it as"):
        read_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "message", "lacks"),
    [
        ({"text": "x", "label": None}, "its keys are text, and null for label", "label"),
        ({"prompt": "x", "completion": None}, "its keys are prompt, and null for completion", "completion"),
    ],
)
def test_a_null_where_a_value_is_needed_is_named(row: dict[str, Any], message: str, lacks: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as raised:
        read_documents(tmp_path / "a.jsonl", among=("classification", "prompt_completion"))
    assert f"lacks a value for {lacks!r}" in raised.value.hint


def test_a_number_as_completion_says_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "1 + 1", "output": 2}\n')
    with pytest.raises(DataError, match='output is 2, not text: write it as "2"'):
        read_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("task", ["qa", "squad", "ner", "seq2seq", "image_classification", "dpo"])
def test_tasks_that_do_not_exist_yet_say_so(task: str) -> None:
    with pytest.raises(
        byway.ConfigError, match=f"data.task is '{task}', which does not exist yet; for now it must be chat, classification or text"
    ):
        byway.Recipe.from_dict({"method": {"name": "lora"}, "data": {"train": "x.jsonl", "task": task}, "output": "runs/x"})
