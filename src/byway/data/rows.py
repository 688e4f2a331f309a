"""``source -> rows with an address``: files, hub data sets and Python iterables, read strictly.

A bad row is reported with its file and line; all of them at once, before any work starts. ``skip_bad=True`` counts them instead and
remembers the first reasons.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byway.data.bad_rows import BadRow, BadRows, plain, snippet
from byway.errors import DataError

__all__ = ["Row", "Rows", "read_rows"]

Source = str | os.PathLike[str] | Iterable[Any]
"""A path, ``hub:owner/name``, several of these, or an iterable of dicts (a `datasets.Dataset` is one)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``where``: its address for messages, ``"chat.jsonl:17"``."""

    fields: dict[str, Any]
    where: str


@dataclass
class Rows:
    """The rows of a source in its order; ``bad``: those skipped, with reasons (``bad.count`` of them)."""

    source: str
    items: list[Row]
    bad: BadRows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def duplicates(self) -> int:
        """How many rows repeat an earlier one, key for key."""
        seen = {json.dumps(row.fields, sort_keys=True, default=repr) for row in self.items}
        return len(self.items) - len(seen)


def read_rows(source: Source, *, skip_bad: bool = False, limit: int | None = None) -> Rows:
    """Read all rows of `source`, or the first `limit`.

    `source`: a path (``.jsonl .ndjson .json .csv .tsv .parquet``, and ``.txt`` with one document a line), ``hub:owner/name[:split]`` or
    ``hub:owner/name:config:split``, a list of these, or an iterable of dicts. Raises :class:`DataError` naming file, line and reason of
    every bad row (the first five in words), or that there are 0 usable rows.
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
        raise DataError(f"{label}: 0 usable rows{reasons}", hint="a row is one JSON object a line; blank lines do not count")
    return Rows(label, items, bad)


def _parts(source: Source) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    """Each part of a source as its name and its ``(where, value or BadRow)`` entries."""
    from byway.data.tables import read_file, read_hub

    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if text.startswith("hub:"):
            yield text, read_hub(text)
        else:
            yield text, read_file(Path(text))
        return
    if isinstance(source, (list, tuple)) and source and all(isinstance(entry, (str, os.PathLike)) for entry in source):
        for entry in source:
            yield from _parts(entry)
        return
    if isinstance(source, dict) or not isinstance(source, Iterable):
        raise DataError(
            f"a {type(source).__name__} is not a source of rows", hint="give a path, hub:owner/name, or a list of dicts, one a row"
        )
    yield "rows", ((f"row {number}", value) for number, value in enumerate(source, start=1))


def _checked(value: Any) -> dict[str, Any]:
    """The row itself, when it is an object of plain values; raises BadRow."""
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"holds {_kind(value)}, not an object: {snippet(str(value))}")
    if not value:
        raise BadRow("holds an empty object")
    plain(value)
    return value


def _kind(value: Any) -> str:
    """What a JSON value is called."""
    kinds: dict[type, str] = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
