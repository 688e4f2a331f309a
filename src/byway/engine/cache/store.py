"""Where units lie: in memory, or as one file each in a directory that is named by what the states depend on.

A unit's file is a safetensors file with the store's key, the unit's number and a CRC-32 of its tensors' bytes in its metadata. It appears
whole, by one rename, and is read through a memory map. What is cut off, damaged or from elsewhere is removed when it is first looked at,
and that is said; it is then computed again. Nothing is flushed to the disk: after a power cut the checksums decide.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from byway.disk.atomic import beside
from byway.errors import RunError

__all__ = ["DiskStore", "MemoryStore", "Shapes", "Store"]

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_OPEN = 4096
"""Units mapped at once."""
_MAX_HEADER = 2**20


class Store(Protocol):
    """Units by number."""

    def get(self, unit: int, shapes: Shapes) -> Mapping[str, Tensor] | None:
        """The unit's tensors, which must have these shapes; None if it has to be computed."""
        ...

    def put(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a unit."""
        ...

    def drop(self) -> None:
        """Forget every unit."""
        ...


class MemoryStore:
    """Units in memory."""

    def __init__(self) -> None:
        self._units: dict[int, Mapping[str, Tensor]] = {}

    def get(self, unit: int, shapes: Shapes) -> Mapping[str, Tensor] | None:
        """The unit's tensors, or None."""
        return self._units.get(unit)

    def put(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a unit."""
        self._units[unit] = {name: tensor.cpu() for name, tensor in tensors.items()}

    def drop(self) -> None:
        """Forget every unit."""
        self._units.clear()


class DiskStore:
    """Units as files in `directory`. Several processes may read and write at once: what they write is the same, bit for bit."""

    def __init__(self, directory: Path, key: str, note: Callable[[str], None]) -> None:
        self.directory = directory
        self.key = key
        self.note = note
        self._maps: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()
        self._checked: dict[int, tuple[int, ...]] = {}
        """Unit → which file it was whose checksum was right."""

    def path(self, unit: int) -> Path:
        """The file of a unit."""
        return self.directory / f"unit-{unit:06}.safetensors"

    def get(self, unit: int, shapes: Shapes) -> Mapping[str, Tensor] | None:
        """The unit's tensors as a memory map; None if there is no file, or none that can be used (which is then gone)."""
        if unit in self._maps:
            self._maps.move_to_end(unit)
            return self._maps[unit]
        path = self.path(unit)
        try:
            which = _which(path)
            tensors = _mapped(path, shapes, {"key": self.key, "unit": str(unit)}, check=self._checked.get(unit) != which)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as failure:
            self.note(f"{path} is not used and made again: {failure}")
            _remove(path)
            return None
        self._maps[unit], self._checked[unit] = tensors, which
        if len(self._maps) > _OPEN:
            self._maps.popitem(last=False)
        return tensors

    def put(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's file in one step. Raises RunError where it cannot be written."""
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
                f"cannot write the cache {path}: {failure.strerror} ({code}); checkpoints are as they were",
                "free some space or name another place with engine.cache: DIR, or set engine.cache: off, in a new run",
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
        """The units that have a file, whatever is in it."""
        return sorted(int(path.stem.removeprefix("unit-")) for path in self.directory.glob("unit-*.safetensors") if path.stem[5:].isdigit())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as failure:
        raise RunError(f"cannot remove {path}: {failure.strerror}", "name another place with engine.cache: DIR") from failure


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Any]:
    """The parts of a safetensors file, in order."""
    header: dict[str, Any] = {}
    parts: list[Any] = []
    start, check = 0, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that each begins at a multiple of its size
        part = _bytes_of(tensor)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + part.nbytes]}
        start, check = start + part.nbytes, zlib.crc32(part, check)
        parts.append(part)
    header["__metadata__"] = {**metadata, "crc32": f"{check:08x}"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # so that tensors begin at a multiple of 8 bytes
    return [len(text).to_bytes(8, "little"), text, *parts]


def _which(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _mapped(path: Path, shapes: Shapes, metadata: Mapping[str, str], *, check: bool) -> dict[str, Tensor]:
    """The tensors of a file that :func:`_serialized` gave; ValueError says why it is none, or not this one."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError("it is cut off, or no safetensors file")
        header = json.loads(stream.read(length))
    own = header.pop("__metadata__")
    for name, value in metadata.items():
        if own.get(name) != value:
            raise ValueError(f"its {name} is {own.get(name)!r}, not {value!r}")
    expected = {name: (_CODES[dtype], list(shape)) for name, (dtype, shape) in shapes.items()}
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != expected:
        raise ValueError("its tensors have other shapes")
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if size != end:
        raise ValueError(f"it has {size} bytes instead of {end}")
    # private: what anybody might write into it stays out of the file
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if check and f"{zlib.crc32(whole[8 + length :].numpy().data):08x}" != own.get("crc32"):
        raise ValueError("its checksum is wrong")
    found: dict[str, Tensor] = {}
    for name, (dtype, shape) in shapes.items():
        first, last = (8 + length + offset for offset in header[name]["data_offsets"])
        found[name] = whole[first:last].view(dtype).reshape(shape) if last > first else torch.empty(shape, dtype=dtype)
    return found
