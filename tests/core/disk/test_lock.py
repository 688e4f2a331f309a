"""One process writes to a directory at a time, and whatever ends a writer frees the directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from byway.core.disk import lock
from byway.core.disk.lock import LOCK, check_free, locked
from byway.errors import BywayError, ConfigError, RunError

HOLDER = """
import sys, time
from pathlib import Path
from byway.core.disk.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def record(directory: Path, **changes: Any) -> None:
    """Leave the record of a writer that this process could be, with changes."""
    with locked(directory):
        values = json.loads((directory / LOCK).read_text(encoding="utf-8"))
    directory.mkdir(exist_ok=True)
    (directory / LOCK).write_text(json.dumps(values | changes), encoding="utf-8")


def test_the_second_is_refused_by_name_and_kill_9_frees_the_directory(tmp_path: Path) -> None:
    with held(tmp_path / "run") as holder:
        for attempt in (check_free, lambda path: locked(path).__enter__()):
            with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} on {socket.gethostname()}") as caught:
                attempt(tmp_path / "run")
            assert caught.value.exit_code == 2
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / "run" / LOCK).is_file(), "left behind"
        check_free(tmp_path / "run")
        with locked(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_leaves_nothing_and_removes_no_directory_with_content(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("mine", encoding="utf-8")
        raise KeyError
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["file"]


def test_it_may_be_taken_again_inside_but_not_by_another_thread(tmp_path: Path) -> None:
    errors: list[BywayError] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                pass
        except BywayError as error:
            errors.append(error)

    with locked(tmp_path), locked(tmp_path / "." / "x" / ".."):
        check_free(tmp_path)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK).is_file()
    assert len(errors) == 1 and f"process {os.getpid()}" in errors[0].message
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\0" * 50, "[" * 5000])
def test_a_damaged_record_is_no_holder(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    check_free(tmp_path)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("locks", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"started": "1"}, False),
        ({"pid": 2**22 + 7}, False),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "boot": "other"}, True),
    ],
    ids=["reused pid", "dead", "another container", "another machine"],
)
def test_a_record_that_was_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool, changes: dict[str, Any], refused: bool
) -> None:
    """Also on a file system without locks, where the record alone decides."""
    record(tmp_path, **({"started": "1"} | changes))
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    if refused:
        for attempt in (check_free, lambda path: locked(path).__enter__()):
            with pytest.raises(ConfigError, match="on elsewhere, since") as caught:
                attempt(tmp_path)
            assert str(tmp_path / LOCK) in caught.value.hint
        return
    check_free(tmp_path)
    with locked(tmp_path):
        pass


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_a_running_holder_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path) as holder:
        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(ConfigError, match=f"process {holder.pid} "), locked(tmp_path):
            pass


def test_of_many_that_start_at_once_one_gets_in(tmp_path: Path) -> None:
    """Also over the file of a killed holder, and although each holder removes it at the end."""
    record(tmp_path, pid=2**22 + 7)
    script = """
import sys, time
from pathlib import Path
from byway.core.disk.lock import locked
from byway.errors import ConfigError
sys.stdin.readline()
for _ in range(40):
    try:
        with locked(Path(sys.argv[1])):
            Path(sys.argv[1], "inside").touch(exist_ok=False)
            Path(sys.argv[1], "inside").unlink()
    except ConfigError as error:
        assert " is in use by process " in error.message, error
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said


def test_a_directory_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"cannot lock .*run"), locked(tmp_path / "run"):
        pass
    assert lock.LOCK.startswith("."), "names with a dot do not count as the content of a run"
