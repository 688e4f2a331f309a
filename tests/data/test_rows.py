from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from byway.data.rows import read_rows
from byway.errors import DataError

GOOD = {"text": "fine"}


def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "one", "label": "a"}, {"text": 'two, "quoted"\nand broken', "label": "é 👍"}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "r.csv").write_text('text,label\none,a\n"two, ""quoted""\nand broken",é 👍\n', encoding="utf-8")
    (tmp_path / "r.tsv").write_text('text\tlabel\none\ta\n"two, ""quoted""\nand broken"\té 👍\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for name in ("r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet"):
        assert [row.fields for row in read_rows(tmp_path / name)] == rows, name
    assert [row.fields for row in read_rows(iter(rows))] == rows
    import datasets

    assert [row.fields for row in read_rows(datasets.Dataset.from_list(rows))] == rows
    several = read_rows([tmp_path / "r.jsonl", tmp_path / "r.csv"])
    assert len(several) == 4


def test_a_text_file_is_one_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    rows = read_rows(tmp_path / "t.txt")
    assert [(row.fields["text"], row.where) for row in rows] == [("first", f"{tmp_path}/t.txt:1"), ("second", f"{tmp_path}/t.txt:3")]


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    for name, body in (
        ("a.jsonl", b'{"text": "x"}\r\n{"text": "y"}\r\n'),
        ("a.csv", b"text\r\nx\r\ny\r\n"),
        ("a.json", b'[{"text":"x"},{"text":"y"}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body)
        assert [row.fields for row in read_rows(tmp_path / name)] == [{"text": "x"}, {"text": "y"}], name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "cut off"),
        (b'{"text": oops}', "not JSON"),
        (b'{"text": NaN}', "NaN"),
        (b'{"text": "\xff\xfe"}', "UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"17", "a number"),
        (b'"words"', "a string"),
        (b'[{"text": "x"}]', "a list"),
        (b"null", "null"),
        (b"{}", "empty object"),
        (b"[" * 2000 + b"]" * 2000, "nested"),
        (b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
        (b'{"text": ' + b"9" * 5000 + b"}", "readable"),
    ],
)
def test_a_bad_line_is_named_with_its_reason_and_can_be_skipped(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, b"", good, line, good]))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    text = caught.value.message
    assert "data.jsonl:4: " in text and words in text
    assert len(text) - len(str(path)) < 180 and "\n" not in text and text.isprintable()
    rows = read_rows(path, skip_bad=True)
    assert len(rows) == 3 and rows.bad.count == 1 and rows.bad.first[0].where.endswith(":4")


def test_all_bad_rows_are_reported_at_once(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"(?s)data.jsonl:2: .*data.jsonl:4: .*data.jsonl:5: ") as caught:
        read_rows(jsonl(GOOD, "x", GOOD, "[]", "{"))
    assert "skip" in caught.value.hint


def test_lone_brackets_of_a_json_file_are_explained(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('[\n  {"text": "a"}\n]\n')
    with pytest.raises(DataError, match=r"data.json$"):
        read_rows(tmp_path / "data.jsonl")
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(read_rows(tmp_path / "lines.json")) == 2


@pytest.mark.parametrize("body", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, suffix: str, body: bytes) -> None:
    if suffix == ".csv" and body.strip():
        body = b"text\n"
    (tmp_path / f"e{suffix}").write_bytes(body)
    with pytest.raises(DataError, match="0 usable rows"):
        read_rows(tmp_path / f"e{suffix}")


def test_paths_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean 'chat\.jsonl'"):
        read_rows(tmp_path / "chta.jsonl")
    with pytest.raises(DataError, match=r"directory; it contains chat\.jsonl"):
        read_rows(tmp_path)
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot read .xlsx"):
        read_rows(tmp_path / "x.xlsx")
    with pytest.raises(DataError, match="hub:owner/name"):
        read_rows("owner/name")
    (tmp_path / "u.jsonl").write_bytes('{"text": "x"}'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_rows(tmp_path / "u.jsonl")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_rows(tmp_path / "p.parquet")
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="'text' twice"):
        read_rows(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("text,label\na,b\na\n")
    with pytest.raises(DataError, match=r"d.csv:3: has 1 cells where the header has 2"):
        read_rows(tmp_path / "d.csv")
    for wrong in (17, {"text": "x"}):
        with pytest.raises(DataError, match="cannot be read from a"):
            read_rows(wrong)  # pyright: ignore


def test_an_unreachable_hub_is_one_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refused)
    start = time.monotonic()
    with pytest.raises(DataError, match="cannot be reached") as caught:
        read_rows("hub:owner/name")
    assert time.monotonic() - start < 5 and "local file" in caught.value.hint
    with pytest.raises(DataError, match="not name a hub dataset"):
        read_rows("hub:owner/name:a:b:c")


def test_reading_a_very_long_row_takes_about_three_times_its_size(tmp_path: Path) -> None:
    import tracemalloc

    size = 25_000_000
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": "x" * size}) + "\n")
    tracemalloc.start()
    rows = read_rows(tmp_path / "big.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows.items[0].fields["text"]) == size
    assert peak < 3.2 * size


def test_a_limit_stops_reading(jsonl: Callable[..., Path]) -> None:
    assert len(read_rows(jsonl(*[GOOD] * 5, "not json"), limit=5)) == 5


def test_every_real_set_is_readable(data_dir: Path) -> None:
    skipped = {"xquad-en"}  # one object per file, not rows
    for folder in sorted(data_dir.iterdir()):
        for path in sorted(folder.glob("*.json*")) if folder.is_dir() and folder.name not in skipped else ():
            assert os.stat(path).st_size == 0 or len(read_rows(path, limit=50)) > 0, path
