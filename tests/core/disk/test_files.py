"""The one writer and the one reader: whole or not at all, and every refusal names the file."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from byway.core.disk.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_text,
    read_json,
    read_safetensors,
    seal,
    verify_seal,
    write_safetensors,
)
from byway.errors import AdapterError, ConfigError, RunError


def never(_: Path) -> bool:
    return False


def always(_: Path) -> bool:
    return True


@pytest.fixture
def umask_027():
    old = os.umask(0o027)
    yield
    os.umask(old)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ------------------------------------------------------------ writing


def test_file_modes_follow_the_umask(tmp_path, umask_027):
    files = [atomic_write_text(tmp_path / "a", "x"), write_safetensors(tmp_path / "b", {"t": torch.ones(2)})]
    with atomic_directory(tmp_path / "d", replace=never) as new:
        files.append(write_safetensors(new / "c", {"t": torch.ones(2)}))
    assert [stat.S_IMODE(f.stat().st_mode) for f in (*files[:2], tmp_path / "d" / "c")] == [0o640] * 3
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_a_link_stays_a_link_and_its_target_is_rewritten(tmp_path):
    real = tmp_path / "real"
    real.write_text("old")
    (tmp_path / "link").symlink_to(real)
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and real.read_text() == "new"


def test_tensors_keep_values_and_dtypes_even_when_they_share_memory(tmp_path):
    shared = torch.arange(6, dtype=torch.bfloat16)
    tensors = {"a": shared, "b": shared, "c": shared[1:3], "d": torch.arange(6.0).reshape(2, 3).T}
    read, metadata = read_safetensors(write_safetensors(tmp_path / "t", tensors))
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_saving_onto_the_file_just_read_keeps_the_values(tmp_path):
    file = write_safetensors(tmp_path / "t", {"a": torch.arange(5000.0)})
    mapped, _ = read_safetensors(file)
    write_safetensors(file, {"a": mapped["a"]})
    assert torch.equal(mapped["a"], torch.arange(5000.0))
    assert torch.equal(read_safetensors(file)[0]["a"], torch.arange(5000.0))


def test_a_directory_with_other_things_is_refused_and_untouched(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=r"thesis\.tex"), atomic_directory(target, replace=never, error=ConfigError):
        pytest.fail("the block must not run")
    assert content(tmp_path) == before


def test_a_directory_is_replaced_whole_and_nothing_is_left_over(tmp_path):
    target = tmp_path / "out"
    for generation in ("one", "two"):
        with atomic_directory(target, replace=always) as new:
            (new / generation).write_text(generation)
            (new / "sub").mkdir()
            (new / "sub" / "file").write_text(generation)
    assert content(tmp_path) == {"out/two": b"two", "out/sub/file": b"two"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failure_inside_the_block_changes_nothing(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyError), atomic_directory(target, replace=always) as new:
        (new / "half").write_text("half")
        raise KeyError("the caller's own")
    assert content(tmp_path) == {"out/old": b"old"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(AdapterError, match="is a file"), atomic_directory(tmp_path / "out", replace=always):
        pytest.fail("the block must not run")


def test_leftovers_of_a_killed_writer_are_swept_by_the_next_one(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from byway.core.disk.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), replace=lambda _: True) as new:\n"
        "    (new / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1, "the killed writer leaves its temporary directory"
    with atomic_directory(tmp_path / "out", replace=never) as new:
        (new / "whole").write_text("whole")
    assert content(tmp_path) == {"out/whole": b"whole"}


def test_a_living_writers_temporary_directory_is_left_alone(tmp_path):
    with atomic_directory(tmp_path / "out", replace=always) as slow:
        with atomic_directory(tmp_path / "out", replace=always) as quick:
            (quick / "quick").write_text("q")
        (slow / "slow").write_text("s")
    assert content(tmp_path) == {"out/slow": b"s"}


def test_a_full_disk_names_path_and_reason_and_keeps_the_old_file(tmp_path):
    file = atomic_write_bytes(tmp_path / "state", b"old")
    write_safetensors(tmp_path / "weights", {"a": torch.zeros(2)})
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match=r"state.*EFBIG") as caught:
            atomic_write_bytes(file, b"x" * 20_000)
        with pytest.raises(RunError, match=r"weights"):
            write_safetensors(tmp_path / "weights", {"a": torch.zeros(5000)})
        with pytest.raises(RunError, match=r"out"), atomic_directory(tmp_path / "out", replace=never) as new:
            (new / "big").write_bytes(b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert caught.value.exit_code == 3
    assert content(tmp_path) == before


def test_a_seal_notices_missing_cut_and_changed_files(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert "complete.json is missing" in verify_seal(tmp_path)
    seal(tmp_path)
    assert verify_seal(tmp_path) == ""
    (tmp_path / "a").write_bytes(b"12344")
    assert "has changed since" in verify_seal(tmp_path)
    (tmp_path / "a").write_bytes(b"1234")
    assert "4 bytes instead of 5" in verify_seal(tmp_path)
    (tmp_path / "a").unlink()
    assert f"{tmp_path / 'a'} is missing" in verify_seal(tmp_path)


# ------------------------------------------------------------ reading

GOOD = save({"a": torch.arange(100.0), "b": torch.ones(3, 4)}, {"format": "pt"})


@pytest.mark.parametrize("kept", [0, 4, 20, len(GOOD) // 2, len(GOOD) - 1])
def test_a_cut_file_is_called_truncated_by_name(tmp_path, kept):
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(GOOD[:kept])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors.* truncated"):
        read_safetensors(file)


def test_bytes_too_many_are_counted(tmp_path):
    file = tmp_path / "t"
    file.write_bytes(GOOD + b"..")
    with pytest.raises(AdapterError, match="2 bytes more"):
        read_safetensors(file)


def header(entries: object, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


HOSTILE = {
    "header length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header of 200 MB": (200 * 2**20).to_bytes(8, "little") + b" " * 100,
    "overlap": header(
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    ),
    "hole": header(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}
    ),
    "past the end": header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}),
    "unknown dtype": header({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}),
    "shape overflow": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}),
    "not JSON": (4).to_bytes(8, "little") + b"abcd",
    "a list": header([1, 2, 3]),
    "deep": (90_000).to_bytes(8, "little") + b"[" * 90_000,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused_by_name_quickly(tmp_path, data):
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(data)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(AdapterError, match=r"hostile\.safetensors"):
        read_safetensors(file)
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_flipped_bytes_are_read_or_refused_but_never_anything_else(tmp_path, seed):
    draw = random.Random(seed)
    file = tmp_path / "t"
    refused = 0
    for _ in range(300):
        data = bytearray(GOOD)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(draw.choice([160, len(data)]))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            read_safetensors(file)
        except AdapterError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"[]", "array"),
        (b"7", "number"),
        (b'{"r": 1, "r": 2}', "'r' appears twice"),
        (b'{"a": {"r": 1, "r": 2}}', "'r' appears twice"),
        (b'\xef\xbb\xbf{"r": 1}', "BOM"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"r": 1,\n "s" 2}', "line 2"),
    ],
)
def test_bad_json_is_refused_by_file_and_reason(tmp_path, data, said):
    file = tmp_path / "adapter_config.json"
    file.write_bytes(data)
    with pytest.raises(AdapterError, match=said) as caught:
        read_json(file)
    assert "adapter_config.json" in caught.value.message


def test_missing_files_and_folders_in_their_place_are_named(tmp_path):
    for read in (read_json, read_safetensors):
        with pytest.raises(AdapterError, match="nowhere"):
            read(tmp_path / "nowhere")
        with pytest.raises(AdapterError, match=str(tmp_path)):
            read(tmp_path)
