"""The safetensors files of a model directory, read and written one tensor at a time, so that no model is ever in memory.

A file is 8 bytes (the header's length, little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes in the
order of their offsets. Tensors that do not change are copied as bytes.
"""

from __future__ import annotations

import json
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
    "Entry",
    "Stored",
    "code_of",
    "dtype_of",
    "read",
    "same_bytes",
    "stored_tensors",
    "write_file",
    "write_index",
]

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
    """Where one tensor's bytes lie: ``file[begin:end]``, in safetensors' dtype code."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its bytes as they are stored elsewhere, or what `value` computes when its turn comes."""

    name: str
    code: str
    shape: tuple[int, ...]
    value: Stored | Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        if isinstance(self.value, Stored):
            return self.value.size
        count = 1
        for extent in self.shape:
            count *= extent
        return count * dtype_of(self.code).itemsize


def code_of(dtype: torch.dtype) -> str:
    """torch's dtype → safetensors' code."""
    return next(code for code, known in _CODES.items() if known is dtype)


def dtype_of(code: str) -> torch.dtype:
    """safetensors' code → torch's dtype; a ConfigError for one torch has not."""
    if code not in _CODES:
        raise ConfigError(f"a tensor is stored as {code}, which torch {torch.__version__} has no type for")
    return _CODES[code]


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files that were checked before, in the order of their bytes."""
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
    """One tensor, memory-mapped."""
    with safetensors.safe_open(stored[name].file, framework="pt") as stream:
        return stream.get_tensor(name)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    if (one.code, one.shape, one.size) != (other.code, other.shape, other.size):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.begin)
        right.seek(other.begin)
        for size in _blocks(one.size):
            if left.read(size) != right.read(size):
                return False
    return True


def write_file(path: Path, entries: Sequence[Entry], on_tensor: Callable[[str], None] | None = None) -> None:
    """Write one safetensors file, tensor after tensor; `on_tensor` hears each name. Not atomic: meant for a temporary directory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # transformers and safetensors expect aligned tensors: wide types first
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
                _write(entry, entry.value(), stream)
            if on_tensor is not None:
                on_tensor(entry.name)


def write_index(directory: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """Write ``model.safetensors.index.json`` for several shards; nothing for a single file."""
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
                raise OSError(0, "became shorter while it was read", os.fspath(source.file))
            target.write(data)


def _blocks(size: int) -> Iterable[int]:
    return (min(BLOCK, size - start) for start in range(0, size, BLOCK))


def _write(entry: Entry, tensor: Tensor, target: BinaryIO) -> None:
    if code_of(tensor.dtype) != entry.code or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name} was planned as {entry.code} {entry.shape} and came as {tensor.dtype} {tuple(tensor.shape)}")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    target.write(flat.numpy().data)
