"""``source -> rows with an address``: files, hub datasets and Python iterables, read strictly.

A bad row is reported with its file and line; all of them at once, before any work starts. With ``skip_bad=True`` they
are counted instead, and the first reasons are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byway.data.bad_rows import BadRow, BadRows, plain, snippet
from byway.data.tables import read_file, read_hub, without_nulls
from byway.errors import DataError

__all__ = ["Row", "Rows", "read_rows"]

Source = str | os.PathLike[str] | Iterable[Any]
"""A path, ``hub:owner/name``, a list of these, or an iterable of dicts (a `datasets.Dataset` is one)."""

_KINDS: dict[type, str] = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
"""The names of JSON values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``where``: its address in messages, ``"chat.jsonl:17"``."""

    fields: dict[str, Any]
    where: str


@dataclass
class Rows:
    """The rows of a source, in order. ``bad``: the rows that were skipped (``bad.count`` of them), with reasons."""

    source: str
    items: list[Row]
    bad: BadRows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def read_rows(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Rows:
    """Read all rows of `source`, or the first `limit`.

    Args:
        source: a path (``.jsonl .ndjson .json .csv .tsv .parquet``, or ``.txt`` with one document per line),
            ``hub:owner/name[:split]``, ``hub:owner/name:config:split``, a list of these, or an iterable of dicts.
        skip_bad: leave out and count bad rows instead of raising.

    Raises:
        DataError: bad rows, with file, line and reason of the first five; or there is no usable row.
    """
    bad = BadRows(skip=skip_bad)
    parts = list(_parts(source))
    label = ", ".join(name for name, _ in parts)
    items: list[Row] = []
    for _, entries in parts:
        for where, value in entries:
            if limit is not None and len(items) >= limit:
                break
            try:
                items.append(Row(_checked(value), where))
            except BadRow as error:
                bad.add(where, str(error))
    bad.check()
    if not items:
        reasons = "".join(f"\n{entry.where}: {entry.reason}" for entry in bad.first[:5])
        raise DataError(f"{label}: 0 usable rows{reasons}", hint="write one JSON object per line; blank lines do not count")
    return Rows(label, items, bad)


def _parts(source: Source) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    """Yield each part of a source as its name and its ``(where, value or BadRow)`` entries."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        yield text, read_hub(text) if text.startswith("hub:") else read_file(Path(text))
    elif isinstance(source, (list, tuple)) and source and all(isinstance(entry, (str, os.PathLike)) for entry in source):
        for entry in source:
            yield from _parts(entry)
    elif isinstance(source, dict) or not isinstance(source, Iterable):
        raise DataError(
            f"rows cannot be read from a {type(source).__name__}", hint="use a path, hub:owner/name, or a list with a dict per row"
        )
    else:
        arrow = type(source).__module__.partition(".")[0] == "datasets"  # a Dataset is an Arrow table
        values = map(without_nulls, source) if arrow else source
        yield "rows", ((f"row {number}", value) for number, value in enumerate(values, start=1))


def _checked(value: Any) -> dict[str, Any]:
    """Return the row itself if it is an object of plain values; raise BadRow otherwise."""
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"holds {_KINDS.get(type(value), f'a {type(value).__name__}')}, not an object: {snippet(str(value))}")
    if not value:
        raise BadRow("holds an empty object")
    plain(value)
    return value
