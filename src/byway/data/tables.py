"""File readers, one per kind of file. Each yields ``(where, value)``; the value is a row or the :class:`BadRow`."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from byway.data.bad_rows import BadRow, parsed, snippet
from byway.errors import DataError, listed, nearest

__all__ = ["SUFFIXES", "read_file", "read_hub", "without_nulls"]

Entries = Iterator[tuple[str, Any]]

UTF16 = (b"\xff\xfe", b"\xfe\xff")
HUB_SECONDS = 5.0
"""Seconds to wait for the hub before it counts as unreachable."""


def read_file(path: Path) -> Entries:
    """Yield the rows of one file, read by its suffix.

    Raises:
        DataError: before the first row, if the file is missing, a directory, UTF-16 or of an unknown kind.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        found = f"it contains {listed(names)}" if names else f"it contains no {listed(SUFFIXES)} file"
        raise DataError(f"{path} is a directory; {found}", hint="name the files to read")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = "for a dataset on the hub, write hub:owner/name" if not path.suffix and str(path).count("/") == 1 else ""
        raise DataError(
            f"{path} does not exist", hint=nearest(path.name, siblings) or hub or "check the path; it is relative to the current directory"
        )
    reader = SUFFIXES.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}", hint=f"supported: {listed(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if head in UTF16:
        raise DataError(f"{path} is UTF-16", hint="save it as UTF-8")
    return reader(path)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(where, line)`` of non-blank lines, without a byte-order mark; line ends stay, to avoid a copy."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                yield f"{path}:{number}", line


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        near = data[max(0, error.start - 20) : error.start + 20].decode("utf-8", "replace")
        raise BadRow(f"is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start + 1}): {snippet(near)}") from None


def _jsonl(path: Path) -> Entries:
    first = True
    for where, line in _lines(path):
        try:
            value = parsed(_decoded(line))
        except BadRow as error:
            if first and line.strip() in (b"[", b"{"):
                raise DataError(
                    f"{where}: the file is one JSON value over several lines, not one object per line",
                    hint=f"rename it to {path.stem}.json",
                ) from None
            value = error
        if isinstance(value, list):
            value = BadRow(
                f"holds a list, not an object (a list of rows needs a .json file): {snippet(line[:200].decode(errors='replace'))}"
            )
        first = False
        yield where, value


def _json(path: Path) -> Entries:
    """Read a list of objects; a JSON Lines file with the wrong suffix is read as JSON Lines."""
    try:
        text = _decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if not text.strip():
            return
        value = parsed(text)
    except BadRow as error:
        first = next(_lines(path), None)
        if first is not None and _is_object(first[1]):
            yield from _jsonl(path)
            return
        raise DataError(f"{path} {error}") from None
    if isinstance(value, dict):
        raise DataError(
            f"{path} holds one object with the keys {listed(value)}, not a list of rows",
            hint="write [ {...}, {...} ], or one object per line in a .jsonl file",
        )
    if not isinstance(value, list):
        raise DataError(f"{path} does not hold a list of rows: {snippet(text)}", hint="write [ {...}, {...} ]")
    for number, row in enumerate(value, start=1):
        yield f"{path}:row {number}", row


def _is_object(line: bytes) -> bool:
    """True if a line by itself is a complete JSON object."""
    try:
        return isinstance(parsed(_decoded(line)), dict)
    except BadRow:
        return False


def _text(path: Path) -> Entries:
    for where, line in _lines(path):
        try:
            yield where, {"text": _decoded(line).rstrip("\r\n")}
        except BadRow as error:
            yield where, error


def _delimited(path: Path, delimiter: str) -> Entries:
    """Read a header and records; a quoted line break is part of a cell. ``where`` is the line a record ends on."""

    def decoded() -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except BadRow as error:
                    raise DataError(f"{path}:{number} {error}", hint="save the file as UTF-8") from None

    previous = csv.field_size_limit(2**31 - 1)
    try:
        lines, head = decoded(), list[str]()
        while not "".join(head).strip() and (line := next(lines, None)) is not None:
            head.append(line)
        if head and (other := _other_delimiter(head[-1], delimiter)):
            own = "commas" if delimiter == "," else "tabs"
            raise DataError(
                f"{path}:{len(head)}: the header {snippet(head[-1].strip())!r} is one column; its cells look separated by {other!r}",
                f"in a {path.suffix} file they are separated by {own}; to convert it with pandas, read it with sep={other!r}",
            )
        reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
        header = next(([cell.strip() for cell in record] for record in reader if any(cell.strip() for cell in record)), None)
        if header is None:
            return
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated or "" in header:
            raise DataError(
                f"{path}:1: the header has {'the column ' + repr(repeated[0]) + ' twice' if repeated else 'a column without a name'}",
                "pandas writes its index as a first column without a name: to_csv(..., index=False)" if header[:1] == [""] else "",
            )
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if len(record) == len(header):
                yield where, dict(zip(header, record, strict=True))
            elif record:
                yield where, BadRow(f"has {len(record)} cells where the header has {len(header)}: {snippet(delimiter.join(record))}")
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table: {error}", hint="check the quotes near the end of the file") from error
    finally:
        csv.field_size_limit(previous)


def _other_delimiter(header: str, delimiter: str) -> str | None:
    """Return what separates the cells of a header that has one cell with `delimiter`, and more with another mark."""

    def cells(mark: str) -> int:
        return len(next(csv.reader([header], delimiter=mark), ()))

    return next((mark for mark in (";", "\t", "|", ",") if cells(delimiter) == 1 and cells(mark) > 1), None)


def _parquet(path: Path) -> Entries:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {snippet(str(error), width=80)}") from error


SUFFIXES: dict[str, Callable[[Path], Entries]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": partial(_delimited, delimiter=","),
    ".tsv": partial(_delimited, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _text,
}


def read_hub(address: str) -> Entries:
    """Yield the rows of ``hub:owner/name[:split]`` or ``hub:owner/name:config:split`` (default split: train).

    With ``HF_HUB_OFFLINE=1`` only cached data are used. Raises :class:`DataError` within seconds if the hub cannot be
    reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, *rest = address.removeprefix("hub:").split(":")
    if not name or len(rest) > 2 or "" in rest:
        raise DataError(
            f"{address} does not name a hub dataset", hint="write hub:owner/name, hub:owner/name:split or hub:owner/name:config:split"
        )
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    if os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        try:  # once, with a short timeout: the library itself would retry for half a minute
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        except HfHubHTTPError as error:
            raise DataError(
                f"{address}: the hub refuses: {snippet(str(error), width=120)}", hint="check owner and name, and whether you have access"
            ) from error
        except Exception as error:  # the HTTP library in use, and so the class, depends on the version of the hub client
            raise DataError(
                f"{address}: the hub cannot be reached ({snippet(str(error))})",
                hint="use a local file, or set HF_HUB_OFFLINE=1 to use a cached copy",
            ) from error
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # raised by the library for a missing dataset, config, split or network
        raise DataError(
            f"{address} cannot be loaded: {snippet(str(error), width=160)}", hint="check owner, name, config and split"
        ) from error
    return ((f"{address}:row {number}", without_nulls(row)) for number, row in enumerate(loaded, start=1))


def without_nulls(value: Any) -> Any:
    """Return a row of an Arrow table without the keys that it holds as null, at every depth.

    In such a table all objects of a column have the keys of all of them: null stands for an absent key.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value
