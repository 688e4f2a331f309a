"""Everything that touches the disk: written whole or not at all, read strictly or refused.

Writing: a temporary name beside the target, its bytes flushed to the disk, then one rename. A reader sees the old content or the new one,
never half of either; a crash leaves at most a ``.NAME.byway-…`` entry, which the next write to the same target removes. File modes follow
the umask. A write that fails (disk full, no permission, …) is a :class:`RunError` that names the path; the target is as it was.

Reading: errors name the file and the reason. No pickle is ever opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import safetensors
from safetensors import SafetensorError

from byway.disk.atomic import beside, flush, install, sweep
from byway.errors import AdapterError, BywayError, RunError, listed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "atomic_directory",
    "atomic_write_bytes",
    "atomic_write_text",
    "read_json",
    "read_safetensors",
    "seal",
    "sha256",
    "to_json",
    "verify_seal",
    "write_safetensors",
]

SEAL = "complete.json"
MAX_JSON_BYTES = 20 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # an entry takes about 120 bytes, so this is more than 100,000 tensors
MAX_DIAGNOSED_BYTES = 2 * 2**20


# ---------------------------------------------------------------- writing


def to_json(value: Any) -> str:
    """`value` as JSON with indent 2 and sorted keys, the way peft writes its configs; NaN and infinity are refused with ValueError."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 in one step; returns the path. Missing parent folders are made."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` in one step; returns the path. Missing parent folders are made."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    return _atomic_file(Path(path), write)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write named tensors in one step, dtypes kept; `metadata` defaults to ``{"format": "pt"}``, which transformers and peft expect.

    Tensors that share memory are each written whole. The same tensors and metadata give the same bytes.
    """
    from safetensors.torch import save_file  # here: this file is also used where torch is not wanted

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
        temporary.chmod(mode)  # safetensors makes a 0600 file of its own, whatever the umask
        if len(notes) > 1:
            _sort_metadata(temporary)

    return _atomic_file(Path(path), write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into the order of its keys, in place: safetensors writes them in a random one."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:  # the same characters, unless safetensors changes how it escapes them
            raise AdapterError(f"the header of {path.name} cannot be put into order", "report this with the version of safetensors")
        stream.seek(8)
        stream.write(text + b" " * (length - len(text)))


def _atomic_file(path: Path, write: Callable[[Path], None]) -> Path:
    target = Path(os.path.realpath(path))  # through a link, so that the link stays one
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
    """Yield an empty temporary directory; when the block ends well, it becomes `path` in one step.

    An existing non-empty directory is replaced only if ``replace(existing)`` is true, otherwise `error` says what is in it, before the
    block runs. If the block raises, nothing has changed. On Linux the exchange of an old directory for the new one is a single system
    call; elsewhere it is two renames, and a crash between them leaves the old one as ``.NAME.byway-…``.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(Path(path), target, replace, error)
    temporary = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary.mkdir()
    except OSError as failure:
        _refuse_write(path, failure)
    try:
        yield temporary
        _check_replaceable(Path(path), target, replace, error)
        try:
            for folder, _, files in os.walk(temporary):
                for name in files:
                    flush(Path(folder, name))
                flush(Path(folder))
            install(temporary, target)
            flush(target.parent)
        except OSError as failure:
            _refuse_write(path, failure)
    except OSError as failure:  # raised by the caller's own writes into the temporary directory
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
        raise error(
            f"{path} is not empty and not something this may replace; it holds: {listed(content, 10)}", "choose another output directory"
        )


def _refuse_write(path: str | os.PathLike[str], failure: Exception) -> NoReturn:
    if isinstance(failure, OSError) and failure.errno is not None:
        reason = f"{os.strerror(failure.errno)} ({errno.errorcode.get(failure.errno, failure.errno)})"
    else:
        reason = str(failure)
    raise RunError(f"cannot write {os.fspath(path)}: {reason}; what was there before is unchanged") from failure


# ---------------------------------------------------------------- completeness


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Write ``complete.json``: every file below `directory` with its size and SHA-256. To be called last."""
    files = sorted(entry for entry in directory.rglob("*") if entry.is_file() and entry != directory / SEAL)
    content = {str(entry.relative_to(directory)): {"bytes": entry.stat().st_size, "sha256": sha256(entry)} for entry in files}
    (directory / SEAL).write_text(to_json(content), encoding="utf-8")


def verify_seal(directory: Path) -> str:
    """``""`` if every file that :func:`seal` listed is there unchanged, otherwise what is wrong, naming the file. Sizes come first."""
    marker = directory / SEAL
    if not marker.is_file():
        return f"{marker} is missing: the writing was not finished"
    try:
        content = read_json(marker)
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content.items()}
    except (BywayError, KeyError, TypeError, ValueError) as failure:
        return f"{marker} cannot be read: {failure}"
    for name, (size, _) in expected.items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    for name, (_, digest) in expected.items():
        if sha256(directory / name) != digest:
            return f"{directory / name} has other content than when it was written"
    return ""


# ---------------------------------------------------------------- reading


def read_json(path: str | os.PathLike[str], *, error: type[BywayError] = AdapterError) -> dict[str, Any]:
    """The JSON object in `path`. Refused with `error`: no such file, a byte-order mark, not UTF-8, duplicate keys, NaN, not an object."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{file} is larger than {MAX_JSON_BYTES // 2**20} MB: not a configuration")
        data = file.read_bytes()
    except OSError as failure:
        raise error(f"cannot read {file}: {failure.strerror}") from failure
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{file} begins with a byte-order mark (BOM)", "save it as plain UTF-8")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise error(f"{file}: the key {key!r} appears twice")
            found[key] = value
        return found

    def no_constant(name: str) -> NoReturn:
        raise error(f"{file}: {name} is not JSON")

    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError as failure:
        raise error(f"{file} is not UTF-8: byte {failure.start}") from failure
    except json.JSONDecodeError as failure:
        raise error(f"{file} is not JSON: line {failure.lineno}, column {failure.colno}: {failure.msg}") from failure
    except RecursionError as failure:
        raise error(f"{file} is nested too deeply") from failure
    if not isinstance(content, dict):
        raise error(f"{file} holds a JSON {_json_kind(content)}, not an object")
    return content


def _json_kind(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def read_safetensors(path: str | os.PathLike[str], *, error: type[BywayError] = AdapterError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU in the dtypes they were stored in, and its metadata.

    The format checks itself (offsets, sizes, dtypes, header); what fails is refused with `error`, which names the file and the reason.
    Values are not checked here: NaN and infinity are the caller's business.
    """
    file = Path(path)
    _check_header(file, error)
    try:
        with safetensors.safe_open(file, framework="pt") as stream:
            names = stream.keys()
            return {name: stream.get_tensor(name) for name in names}, dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as failure:
        raise error(f"{file} {_diagnosis(file, failure)}", "copy or download it again") from failure


def _check_header(file: Path, error: type[BywayError]) -> None:
    """Refuse by size alone what is not worth reading: too short, or a header longer than the file or any sensible limit."""
    try:
        if file.exists() and not file.is_file():
            raise error(f"{file} is not a file")
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
    except OSError as failure:
        raise error(f"cannot read {file}: {failure.strerror}") from failure
    if size < 8:
        raise error(f"{file} is truncated: {size} bytes, a safetensors file has at least 8", "copy or download it again")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise error(f"{file} is not a safetensors file: its first 8 bytes announce a header of {length} bytes")
    if 8 + length > size:
        raise error(f"{file} is truncated inside its header: {size} bytes of at least {8 + length}", "copy or download it again")


def _diagnosis(file: Path, failure: Exception) -> str:
    """Why safetensors refused the file: too short and too long by how many bytes, otherwise its own words."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_DIAGNOSED_BYTES:  # Python objects take ten times the header's size
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
