"""Read and write the safetensors files of a model directory one tensor at a time, without holding the model in memory.

A file consists of 8 bytes (header length, little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes in the order of their offsets. Unchanged tensors are copied as bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from byway.errors import ConfigError

__all__ = [
    "Entry", "Stored", "code_of", "dtype_of", "read", "same_bytes", "stored_tensors", "write_file", "write_index",
]  # fmt: skip

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK = 2**22

_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Location of one tensor in a file: bytes ``[begin:end]``."""

    file: Path
    code: str
    """dtype as safetensors spells it, such as ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Entry:
    """One tensor to write. `value`: stored bytes to copy, or a function that computes the tensor when it is written."""

    name: str
    code: str
    shape: tuple[int, ...]
    value: Stored | Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.value.size if isinstance(self.value, Stored) else math.prod(self.shape) * dtype_of(self.code).itemsize


def code_of(dtype: torch.dtype) -> str:
    """Return safetensors' code for a torch dtype."""
    return next(code for code, known in _CODES.items() if known is dtype)


def dtype_of(code: str) -> torch.dtype:
    """Return the torch dtype for safetensors' code. Raises ConfigError if torch has no such dtype."""
    if code not in _CODES:
        raise ConfigError(f"a tensor is stored as {code}, which torch {torch.__version__} does not support")
    return _CODES[code]


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Locate every tensor of `files`, in file order. The files must have been checked before."""
    found: dict[str, Stored] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end)
    return found


def read(stored: Mapping[str, Stored], name: str) -> Tensor:
    """Return one tensor, memory-mapped."""
    with safetensors.safe_open(stored[name].file, framework="pt") as stream:
        return stream.get_tensor(name)


def same_bytes(one: Stored, other: Stored) -> bool:
    """True if two stored tensors have the same dtype, shape and bytes."""
    if (one.code, one.shape, one.size) != (other.code, other.shape, other.size):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.begin)
        right.seek(other.begin)
        return all(left.read(size) == right.read(size) for size in _blocks(one.size))


def write_file(path: Path, entries: Sequence[Entry], on_tensor: Callable[[str], None] | None = None) -> None:
    """Write one safetensors file, one tensor after the other, and call `on_tensor` with each name. Not atomic."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # safetensors expects aligned tensors: wide dtypes first
    ordered = sorted(entries, key=lambda entry: -dtype_of(entry.code).itemsize)
    end = 0
    for entry in ordered:
        header[entry.name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            if isinstance(entry.value, Stored):
                _copy(entry.value, stream)
            else:
                tensor = entry.value()
                if code_of(tensor.dtype) != entry.code or tuple(tensor.shape) != entry.shape:
                    planned = f"{entry.name} was planned as {entry.code} {entry.shape}"
                    raise ValueError(f"{planned} but computed as {tensor.dtype} {tuple(tensor.shape)}")
                stream.write(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if on_tensor is not None:
                on_tensor(entry.name)


def write_index(directory: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """Write ``model.safetensors.index.json`` for several shards. A single file needs no index."""
    if list(files) == [SINGLE]:
        return
    total = sum(entry.size for entries in files.values() for entry in entries)
    where = {entry.name: file for file, entries in files.items() for entry in entries}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy(source: Stored, target: BinaryIO) -> None:
    with source.file.open("rb") as stream:
        stream.seek(source.begin)
        for size in _blocks(source.size):
            data = stream.read(size)
            if len(data) != size:
                raise OSError(0, "was truncated while being read", os.fspath(source.file))
            target.write(data)


def _blocks(size: int) -> Iterable[int]:
    """Return the sizes of the blocks in which `size` bytes are read."""
    return (min(BLOCK, size - start) for start in range(0, size, BLOCK))
