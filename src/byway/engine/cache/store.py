"""Units of states in memory, or as one file each in a directory named after what the states depend on.

States are kept exactly (``same``), rounded to bfloat16 (``bf16``), or as 8-bit integers (``int8``): h ≈ q · r · c with
integers q in [−127, 127], a factor r per token and a factor c per channel of a unit. Transformers have a few channels,
and a first token, whose states are a hundred times larger than the rest; with factors of one kind only, all other
states would be left with two or three bits.

A unit's file is a safetensors file with the key of the store, the number of the unit and a CRC-32 of the tensors' bytes
in its metadata. It is renamed into place when it is complete, and read through a memory map. A file that is truncated,
damaged or of another store is removed when it is first read, a note says so, and the unit is computed again. Files are
not flushed to the disk: after a power cut the checksums decide.

Shapes: n tokens, d width.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from byway.core.disk.atomic import beside
from byway.errors import RunError

__all__ = ["DiskStore", "Kept", "MemoryStore", "Shapes", "bytes_per_row", "decode", "encode", "parts"]

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Kept = Literal["same", "bf16", "int8"]

_ROW, _CHANNEL = ".row", ".channel"
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_OPEN = 4096
"""Units mapped at a time."""
_MAX_HEADER = 2**20


def encode(name: str, states: Tensor, kept: Kept) -> dict[str, Tensor]:
    """Return the tensors, by name, that represent `states` (n, d) in a file."""
    if kept == "same":
        return {name: states}
    if kept == "bf16":
        return {name: states.to(torch.bfloat16)}
    wide = states.float()
    channel = wide.abs().median(dim=0).values.clamp_min(1e-12)  # (d,)
    scaled = wide / channel
    row = scaled.abs().amax(dim=1).clamp_min(1e-30) / 127  # (n,)
    whole = (scaled / row[:, None]).round().to(torch.int8)
    return {name: whole, name + _ROW: row, name + _CHANNEL: channel}


def decode(name: str, tensors: Mapping[str, Tensor], first: int, last: int, kept: Kept, dtype: torch.dtype) -> Tensor:
    """Return rows `first` to `last` (excluded) of encoded states in `dtype`, as a view if possible."""
    own = tensors[name][first:last]
    if kept != "int8":
        return own if own.dtype == dtype else own.to(dtype)
    return (own.float() * tensors[name + _ROW][first:last, None] * tensors[name + _CHANNEL]).to(dtype)


def parts(name: str, rows: int, width: int, dtype: torch.dtype, kept: Kept) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that :func:`encode` returns, by name."""
    if kept == "int8":
        return {name: (torch.int8, (rows, width)), name + _ROW: (torch.float32, (rows,)), name + _CHANNEL: (torch.float32, (width,))}
    return {name: (dtype if kept == "same" else torch.bfloat16, (rows, width))}


def bytes_per_row(width: int, dtype: torch.dtype, kept: Kept) -> int:
    """Return the bytes on disk of one token's states."""
    return width + 4 if kept == "int8" else width * (dtype if kept == "same" else torch.bfloat16).itemsize


# ---------------------------------------------------------------- stores


class MemoryStore:
    """Units in memory."""

    def __init__(self) -> None:
        self._units: dict[int, Mapping[str, Tensor]] = {}

    def get(self, unit: int, shapes: Shapes) -> Mapping[str, Tensor] | None:
        """Return the unit's tensors, or None."""
        return self._units.get(unit)

    def put(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a unit."""
        self._units[unit] = {name: tensor.cpu() for name, tensor in tensors.items()}


class DiskStore:
    """Units as files in `directory`. Several processes may read and write at once, because they write the same bits."""

    def __init__(self, directory: Path, key: str, note: Callable[[str], None]) -> None:
        self.directory = directory
        self.key = key
        self.note = note
        self._maps: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()
        self._checked: dict[int, tuple[int, ...]] = {}
        """Unit → identity of the file whose checksum was verified."""

    def path(self, unit: int) -> Path:
        """Return the file of a unit."""
        return self.directory / f"unit-{unit:06}.safetensors"

    def get(self, unit: int, shapes: Shapes) -> Mapping[str, Tensor] | None:
        """Return the unit's tensors as a memory map; None if there is no valid file. Removes an invalid one."""
        if unit in self._maps:
            self._maps.move_to_end(unit)
            return self._maps[unit]
        path = self.path(unit)
        try:
            found = path.stat()
            identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
            tensors = _mapped(path, shapes, {"key": self.key, "unit": str(unit)}, check=self._checked.get(unit) != identity)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as failure:
            self.note(f"{path} cannot be used and is made again: {failure}")
            _remove(path)
            return None
        self._maps[unit], self._checked[unit] = tensors, identity
        if len(self._maps) > _OPEN:
            self._maps.popitem(last=False)
        return tensors

    def put(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's file atomically. Raises RunError if it cannot be written."""
        path = self.path(unit)
        temporary = beside(path)
        data = _serialized(tensors, {"key": self.key, "unit": str(unit)})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                for part in data:
                    stream.write(part)
            os.replace(temporary, path)
        except OSError as failure:
            code = errno.errorcode.get(failure.errno or 0, failure.errno)
            raise RunError(
                f"cannot write the cache {path}: {failure.strerror} ({code}). Checkpoints are not affected",
                "start a new run with more free space, another directory (engine.cache: DIR), or engine.cache: off",
            ) from failure
        finally:
            temporary.unlink(missing_ok=True)
        self._maps.pop(unit, None)

    def drop(self) -> None:
        """Remove every unit's file."""
        self._maps.clear()
        self._checked.clear()
        for path in self.directory.glob("unit-*.safetensors"):
            _remove(path)

    def there(self) -> list[int]:
        """Return the units that have a file, valid or not."""
        return sorted(int(path.stem.removeprefix("unit-")) for path in self.directory.glob("unit-*.safetensors") if path.stem[5:].isdigit())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as failure:
        raise RunError(f"cannot remove {path}: {failure.strerror}", "set another directory with engine.cache: DIR") from failure


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Any]:
    """Return the parts of a safetensors file, in order."""
    header: dict[str, Any] = {}
    data: list[Any] = []
    start, check = 0, 0
    # aligned: each starts at a multiple of its size
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        part = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + part.nbytes]}
        start, check = start + part.nbytes, zlib.crc32(part, check)
        data.append(part)
    header["__metadata__"] = {**metadata, "crc32": f"{check:08x}"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # tensors start at a multiple of 8 bytes
    return [len(text).to_bytes(8, "little"), text, *data]


def _mapped(path: Path, shapes: Shapes, metadata: Mapping[str, str], *, check: bool) -> dict[str, Tensor]:
    """Return the tensors of a file of :func:`_serialized`. Raises ValueError if it is not the expected one."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError("it is truncated or not a safetensors file")
        header = json.loads(stream.read(length))
    own = header.pop("__metadata__")
    for name, value in metadata.items():
        if own.get(name) != value:
            raise ValueError(f"its {name} is {own.get(name)!r}, not {value!r}")
    expected = {name: (_CODES[dtype], list(shape)) for name, (dtype, shape) in shapes.items()}
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != expected:
        raise ValueError("its tensors do not have the expected shapes")
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if size != end:
        raise ValueError(f"it has {size} bytes instead of {end}")
    # private: writes to the tensors do not reach the file
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if check and f"{zlib.crc32(whole[8 + length :].numpy().data):08x}" != own.get("crc32"):
        raise ValueError("its checksum is wrong")
    found: dict[str, Tensor] = {}
    for name, (dtype, shape) in shapes.items():
        first, last = (8 + length + offset for offset in header[name]["data_offsets"])
        found[name] = whole[first:last].view(dtype).reshape(shape) if last > first else torch.empty(shape, dtype=dtype)
    return found
