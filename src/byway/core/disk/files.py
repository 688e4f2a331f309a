"""Atomic writes and strict reads.

Writing: write to a temporary name next to the target, flush it to disk, then rename. A reader sees either the old or
the new content, never a mix. A crash leaves at most a ``.NAME.byway-…`` entry, which the next write to the same target
deletes. File modes follow the umask. A failed write (disk full, no permission, …) raises a :class:`RunError` that names
the path; the target is unchanged.

Reading: errors name the file and the reason. No pickle is ever opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import safetensors
from safetensors import SafetensorError

from byway.core.disk.atomic import beside, flush, install, sweep
from byway.errors import AdapterError, BywayError, RunError, listed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "atomic_directory", "atomic_write_bytes", "atomic_write_text", "finite_json", "read_json", "read_safetensors",
    "read_safetensors_header", "seal", "sha256", "to_json", "verify_seal", "write_safetensors",
]  # fmt: skip

SEAL = "complete.json"
MAX_JSON_BYTES = 20 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # an entry takes about 120 bytes, so this is room for more than 100,000 tensors
MAX_DIAGNOSED_BYTES = 2 * 2**20


# ---------------------------------------------------------------- writing


def to_json(value: Any) -> str:
    """Serialize to JSON with indent 2 and sorted keys, like peft's configs. NaN and infinity raise ValueError."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def finite_json(value: Any) -> Any:
    """Return `value` with JSON types only: keys become strings, tuples lists, and NaN and infinity None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite_json(entry) for key, entry in value.items()}
    return [finite_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 atomically and return the path. Creates missing parent directories."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` atomically and return the path. Creates missing parent directories."""
    return _atomic_file(Path(path), lambda temporary: temporary.write_bytes(data))


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors atomically in their own dtypes and return the path.

    Tensors that share memory are each written in full. The same tensors and metadata give the same bytes. `metadata`
    defaults to ``{"format": "pt"}``, which transformers and peft expect.
    """
    from safetensors.torch import save_file  # imports torch, which other users of this module do not need

    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().to("cpu").contiguous()
        where = kept.untyped_storage().data_ptr()
        ready[name] = kept.clone() if where in storages else kept
        storages.add(where)

    notes = dict(metadata or {"format": "pt"})

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(ready, temporary, notes)
        temporary.chmod(mode)  # safetensors creates the file with mode 0600 whatever the umask
        if len(notes) > 1:
            _sort_metadata(temporary)

    return _atomic_file(Path(path), write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by key, in place; safetensors writes it in random order."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:  # the same length, unless safetensors changes how it escapes characters
            raise AdapterError(f"cannot sort the header of {path.name}", "report this with your safetensors version")
        stream.seek(8)
        stream.write(text + b" " * (length - len(text)))


def _atomic_file(path: Path, write: Callable[[Path], object]) -> Path:
    target = Path(os.path.realpath(path))  # write through a symbolic link instead of replacing it
    temporary = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        write(temporary)
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        _refuse_write(path, error)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    replace: Callable[[Path], bool],
    error: type[BywayError] = AdapterError,
) -> Iterator[Path]:
    """Yield an empty temporary directory that atomically becomes `path` when the block succeeds.

    Replaces an existing non-empty directory only if ``replace(existing)`` is true; otherwise raises `error`, which
    lists its content, before the block runs. If the block raises, nothing changes. On Linux the old and new directories
    are swapped in a single system call; elsewhere in two renames, and a crash in between leaves the old one as
    ``.NAME.byway-…``.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(Path(path), target, replace, error)
    temporary = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary.mkdir()
        yield temporary
        _check_replaceable(Path(path), target, replace, error)
        for folder, _, files in os.walk(temporary):
            for name in files:
                flush(Path(folder, name))
            flush(Path(folder))
        install(temporary, target)
        flush(target.parent)
    except OSError as failure:  # also from the caller's writes into the temporary directory
        _refuse_write(path, failure)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(path: Path, target: Path, replace: Callable[[Path], bool], error: type[BywayError]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise error(f"{path} is a file, not a directory", "choose another output path")
    content = sorted(entry.name for entry in target.iterdir())
    if content and not replace(target):
        raise error(f"{path} is not empty and may not be replaced; it holds: {listed(content, 10)}", "choose another output directory")


def _refuse_write(path: str | os.PathLike[str], failure: Exception) -> NoReturn:
    if isinstance(failure, OSError) and failure.errno is not None:
        reason = f"{os.strerror(failure.errno)} ({errno.errorcode.get(failure.errno, failure.errno)})"
    else:
        reason = str(failure)
    raise RunError(f"cannot write {os.fspath(path)}: {reason}; its previous content is unchanged") from failure


# ---------------------------------------------------------------- completeness


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Write ``complete.json``, which lists every file below `directory` with its size and SHA-256. Call this last."""
    files = sorted(entry for entry in directory.rglob("*") if entry.is_file() and entry != directory / SEAL)
    content = {str(entry.relative_to(directory)): {"bytes": entry.stat().st_size, "sha256": sha256(entry)} for entry in files}
    (directory / SEAL).write_text(to_json(content), encoding="utf-8")


def verify_seal(directory: Path) -> str:
    """Check the files that :func:`seal` listed, sizes first. Return the first problem, naming the file, or ``""``."""
    marker = directory / SEAL
    if not marker.is_file():
        return f"{marker} is missing: writing was interrupted"
    try:
        content = read_json(marker)
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content.items()}
    except (BywayError, KeyError, TypeError, ValueError, OverflowError) as failure:
        return f"{marker} cannot be read: {failure}"
    for name, (size, _) in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    for name, (_, digest) in expected.items():
        if sha256(directory / name) != digest:
            return f"{directory / name} has changed since it was written"
    return ""


# ---------------------------------------------------------------- reading


def read_json(path: str | os.PathLike[str], *, error: type[BywayError] = AdapterError) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises `error` if there is no such file, or it has a byte-order mark, invalid UTF-8 (a lone surrogate as well),
    duplicate keys, NaN or a number that no float holds, or holds no object.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{file} is larger than {MAX_JSON_BYTES // 2**20} MB: too large for a configuration file")
        data = file.read_bytes()
    except OSError as failure:
        raise error(f"cannot read {file}: {failure.strerror}") from failure
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{file} starts with a byte-order mark (BOM)", "save it as UTF-8 without a BOM")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise error(f"{file}: the key {key!r} appears twice")
            found[key] = value
        return found

    def no_constant(name: str) -> NoReturn:
        raise error(f"{file}: {name} is not valid JSON")

    def in_range(text: str) -> float:
        if math.isinf(float(text)):
            raise error(f"{file}: the number {text[:20]}{'…' if len(text) > 20 else ''} is too large")
        return float(text) if set(text) & set(".eE") else int(text)

    try:
        content = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant, parse_float=in_range, parse_int=in_range
        )
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{file} is not UTF-8: invalid byte at position {failure.start}") from failure
    except json.JSONDecodeError as failure:
        raise error(f"{file} is not valid JSON: line {failure.lineno}, column {failure.colno}: {failure.msg}") from failure
    except UnicodeEncodeError as failure:
        raise error(f"{file} holds {failure.object[failure.start]!a}, half of a surrogate pair, which is no character") from failure
    except ValueError as failure:  # an integer of more digits than Python reads
        raise error(f"{file} is not valid JSON: {failure}") from failure
    except RecursionError as failure:
        raise error(f"{file} is nested too deeply") from failure
    if not isinstance(content, dict):
        kind = {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(content), "number")
        raise error(f"{file} holds a JSON {kind}, not an object")
    return content


def read_safetensors(path: str | os.PathLike[str], *, error: type[BywayError] = AdapterError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, on the CPU in their stored dtypes, and its metadata.

    Raises `error`, which names the file and the reason, if header, offsets, sizes or dtypes are invalid. Does not check
    values for NaN or infinity.
    """
    with _open_safetensors(Path(path), error) as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, dict(stream.metadata() or {})  # noqa: SIM118


def read_safetensors_header(
    path: str | os.PathLike[str], *, error: type[BywayError] = AdapterError
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shape of each tensor of a safetensors file and its metadata, without reading a tensor.

    Raises `error` as :func:`read_safetensors` does.
    """
    with _open_safetensors(Path(path), error) as stream:
        shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        return shapes, dict(stream.metadata() or {})


@contextlib.contextmanager
def _open_safetensors(file: Path, error: type[BywayError]) -> Iterator[Any]:
    """Yield the handle of a checked file; whatever its library raises within the context becomes `error`."""
    try:
        if file.exists() and not file.is_file():
            raise error(f"{file} is not a file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
    except OSError as failure:
        raise error(f"cannot read {file}: {failure.strerror}") from failure
    if size < 8:
        raise error(f"{file} is truncated: {size} bytes; a safetensors file has at least 8", "copy or download it again")
    if length > MAX_HEADER_BYTES:
        raise error(f"{file} is not a safetensors file: its first 8 bytes give a header length of {length} bytes")
    if 8 + length > size:
        raise error(f"{file} is truncated inside its header: {size} of at least {8 + length} bytes", "copy or download it again")
    try:
        with safetensors.safe_open(file, framework="pt") as stream:
            yield stream
    except Exception as failure:  # the library passes on what torch raises for a dtype or a shape: of any class
        raise error(f"{file} {_diagnosis(file, failure)}", "copy or download it again") from failure


def _diagnosis(file: Path, failure: Exception) -> str:
    """Return why safetensors rejected the file: bytes missing or extra, else its own message."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_DIAGNOSED_BYTES:  # parsed, a header takes ten times its size in memory
                return f"is damaged: {failure}"
            header = json.loads(stream.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"is not a safetensors file: {failure}"
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        return f"is truncated: {size} bytes, its header describes {expected}"
    if size > expected:
        return f"has {size - expected} bytes more than its header describes (a truncated copy over an older file?)"
    return f"is damaged: {failure}"
