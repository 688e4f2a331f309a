"""The cache on disk: keys, crashes, damaged files, several processes, size limits and eviction."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import byway
from byway.engine.cache import TrunkCache
from byway.engine.cache import root as stores
from byway.engine.cache.store import DiskStore
from byway.errors import ConfigError, RunError
from tests import tiny
from tests.engine.cache.test_trunk import LENGTHS, UNIT, Documents, adapted, one_thread

__all__ = ["one_thread"]

PATH = "model.layers.1"


def cache_in(root: Path, model: Any = None, documents: Documents | None = None, **options: Any) -> TrunkCache:
    documents = documents or Documents("llama")
    return TrunkCache(model or adapted("llama"), documents.padded, documents.lengths, root=root, unit_tokens=UNIT, **options)


def built(root: Path, **options: Any) -> TrunkCache:
    cache = cache_in(root, **options)
    with cache:
        cache.build()
    return cache


def states(cache: TrunkCache) -> list[torch.Tensor]:
    with cache:
        return [tensor.clone() for tensor in cache.states(range(len(LENGTHS)))[PATH]]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) == len(LENGTHS) and all(map(torch.equal, one, other))


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("trunk-*/unit-*.safetensors"))}


# ---------------------------------------------------------------- keys


def test_later_adapters_of_any_rank_method_and_start_find_the_same_store(tmp_path: Path) -> None:
    first = built(tmp_path)
    for method in (byway.LoRA(rank=9, targets=["q_proj"], layers="2-"), byway.DoRA(rank=2, targets="all-linear", layers="2-")):
        later = cache_in(tmp_path, model=adapted("llama", method))
        with later:
            later.build()
        assert later.computed == 0 < first.computed
        assert later.key == first.key


def changed_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data[3] += 1e-3


def changed_matrix(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[5, 7] += 1e-3


def changed_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[11, 0] += 1e-3


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def half(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [changed_norm, changed_matrix, changed_embedding, eager, half])
def test_another_base_below_is_another_key(tmp_path: Path, change: Any) -> None:
    model = adapted("llama")
    before = cache_in(tmp_path, model=model).key
    change(model)
    assert cache_in(tmp_path, model=model).key != before


def test_a_base_that_differs_above_only_has_the_same_states(tmp_path: Path) -> None:
    model = adapted("llama")
    before = cache_in(tmp_path, model=model).key
    model.model.layers[2].mlp.up_proj.weight.data[5, 7] += 1e-3
    model.model.layers[2].input_layernorm.weight.data[5] += 1e-3
    assert cache_in(tmp_path, model=model).key == before


def test_every_token_kept_position_layer_and_storage_is_in_the_key(tmp_path: Path) -> None:
    model = adapted("llama")
    one, other = Documents("llama"), Documents("llama")
    other.rows[4] = other.rows[4].clone()
    other.rows[4][-1] = 3 if other.rows[4][-1] != 3 else 4
    lower = adapted("llama", byway.LoRA(rank=2, targets="all-linear", layers="1-"))
    keys = [
        cache_in(tmp_path, model=model, documents=one).key,
        cache_in(tmp_path, model=model, documents=other).key,
        cache_in(tmp_path, model=model, kept=[(0,)] * len(LENGTHS)).key,
        cache_in(tmp_path, model=model, dtype="bf16").key,
        cache_in(tmp_path, model=lower).key,
        TrunkCache(model, one.packed, one.lengths, root=tmp_path, unit_tokens=UNIT).key,
        TrunkCache(model, one.padded, one.lengths, root=tmp_path, unit_tokens=2 * UNIT).key,
    ]
    assert len(set(keys)) == len(keys)
    assert not list(tmp_path.iterdir())  # computing a key writes nothing


# ---------------------------------------------------------------- files


def test_a_unit_is_a_safetensors_file_of_the_estimated_size(tmp_path: Path) -> None:
    cache = built(tmp_path)
    found = [load_file(path)[PATH] for path in sorted(tmp_path.glob("trunk-*/unit-*"))]
    assert sum(len(tensor) for tensor in found) == sum(LENGTHS)
    assert cache.bytes == sum(tensor.numel() * 4 for tensor in found)
    on_disk = sum(len(data) for data in files(tmp_path).values())
    assert cache.bytes < on_disk < cache.bytes + 500 * len(found)
    assert os.listdir(tmp_path / f"trunk-{cache.key}" / "users") == []  # released


@pytest.mark.parametrize("kept", ["same", "bf16", "int8"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: os.urandom(len(data)),
    ],
)
def test_a_damaged_unit_is_made_again_to_the_bit_and_that_is_said(tmp_path: Path, damage: Any, kept: Any) -> None:
    cache = built(tmp_path, dtype=kept)
    before = files(tmp_path)
    victim = sorted(tmp_path.glob("trunk-*/unit-*"))[1]
    victim.write_bytes(damage(victim.read_bytes()))
    notes: list[str] = []
    again = cache_in(tmp_path, dtype=kept, note=notes.append)
    with again:
        again.build()
    assert again.key == cache.key and again.computed == 1
    assert len(notes) == 1 and str(victim) in notes[0] and "made again" in notes[0]
    assert files(tmp_path) == before


def test_a_unit_of_another_store_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    one, other = built(tmp_path), built(tmp_path, dtype="bf16")
    unit = "unit-000001.safetensors"
    (tmp_path / f"trunk-{one.key}" / unit).write_bytes((tmp_path / f"trunk-{other.key}" / unit).read_bytes())
    notes: list[str] = []
    assert states(cache_in(tmp_path, note=notes.append)) and "its key is" in notes[0]


def test_a_unit_missing_a_document_is_computed_whole_and_gives_the_same_bits(tmp_path: Path) -> None:
    whole = states(built(tmp_path))
    for path in sorted(tmp_path.glob("trunk-*/unit-*"))[::2]:
        path.unlink()
    again = cache_in(tmp_path)
    assert equal(states(again), whole) and again.computed > 0


@pytest.fixture
def forked() -> Any:
    """The context of forked processes, which start within milliseconds."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    return multiprocessing.get_context("fork")


def _killed_at_the_third_unit(root: Path) -> None:
    plain, count = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        count[0] += "unit-" in str(target)
        if count[0] == 3:
            os.kill(os.getpid(), 9)  # the file is written but not yet renamed
        plain(source, target)

    os.replace = replace
    built(root)


def test_a_process_killed_while_it_writes_a_unit_leaves_a_store_that_can_be_used(tmp_path: Path, forked: Any) -> None:
    process = forked.Process(target=_killed_at_the_third_unit, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    store = next(tmp_path.glob("trunk-*"))
    assert len(list(store.glob("unit-*"))) == 2 and len(list(store.glob(".unit-*"))) == 1 and os.listdir(store / "users")
    cache = cache_in(tmp_path)
    with cache:
        cache.build()
        assert cache.computed == len(cache.units.members) - 2
        assert len(os.listdir(store / "users")) == 1  # its own; the mark of the killed process is gone
    assert not list(store.glob(".unit-*"))
    assert equal(states(cache), states(cache_in(tmp_path / "fresh")))


def _build(root: Path, barrier: Any, reverse: bool) -> None:
    cache = cache_in(root)
    with cache:
        barrier.wait(60)
        for document in sorted(range(len(LENGTHS)), reverse=reverse):
            cache.states([document])


def test_two_processes_may_build_one_store_at_once(tmp_path: Path, forked: Any) -> None:
    barrier = forked.Barrier(2)
    both = [forked.Process(target=_build, args=(tmp_path / "both", barrier, reverse)) for reverse in (False, True)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    built(tmp_path / "alone")
    assert files(tmp_path / "both") == files(tmp_path / "alone")


# ---------------------------------------------------------------- room


def other_store(root: Path, name: str, size: int, age: float) -> Path:
    """Another store, last used `age` seconds ago."""
    own = stores.claim(root, name, {})
    (own.store / "unit-000000.safetensors").write_bytes(bytes(size))
    own.release()
    os.utime(own.store / "store.json", (time.time(), time.time() - age))
    return own.store


def test_the_oldest_stores_that_nobody_uses_make_room(tmp_path: Path) -> None:
    old, older, newest = (other_store(tmp_path, name, 4000, age) for name, age in (("a", 200), ("b", 300), ("c", 100)))
    busy = other_store(tmp_path, "d", 4000, 400)
    stores.Claim(busy).beat()  # in use by this process
    foreign = tmp_path / "trunk-not-ours"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not touch")
    notes: list[str] = []
    cache = cache_in(tmp_path, limit_gb=(4000 * 2 + sum(LENGTHS) * 128 + 100) / 1e9, note=notes.append)
    cache.open()
    assert (older.exists(), old.exists(), newest.exists(), busy.exists()) == (False, False, True, True)
    assert len(notes) == 2 and all("to stay below engine.cache_limit_gb" in text for text in notes)
    assert (foreign / "thesis.txt").read_text() == "do not touch"
    cache.close()


def test_a_store_that_is_too_large_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    cache = cache_in(tmp_path, limit_gb=1e-6)
    with pytest.raises(ConfigError, match=r"engine\.cache_limit_gb is 1e-06"):
        cache.open()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has room for" in cache_in(tmp_path).problem()
    monkeypatch.undo()
    built(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cache_in(tmp_path).problem() == ""  # existing units need no further space


def test_a_mark_of_another_machine_counts_while_it_is_fresh(tmp_path: Path) -> None:
    store = other_store(tmp_path, "a", 10, 500)
    mark = store / "users" / "0123abcd-17-00000000"
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    assert stores.stores(tmp_path)[0].busy
    os.utime(mark, (time.time(), time.time() - 7200))
    assert not stores.stores(tmp_path)[0].busy


def test_a_store_deleted_under_a_running_process_is_made_again(tmp_path: Path) -> None:
    import shutil

    whole = states(cache_in(tmp_path / "other"))
    cache = cache_in(tmp_path / "own")
    with cache:
        cache.states([0, 1])
        shutil.rmtree(tmp_path / "own")
        found = [tensor.clone() for tensor in cache.states(range(len(LENGTHS)))[PATH]]
    assert equal(found, whole)


def test_what_cannot_be_written_is_a_run_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    cache.open()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot write the cache .*unit-00000\d.safetensors: No space left on device \(ENOSPC\)"):
        cache.build()
    monkeypatch.undo()
    cache.close()
    assert not list(tmp_path.glob("trunk-*/.unit-*"))


def test_many_units_are_mapped_with_few_open_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    if before is None:
        pytest.skip("this system does not list open files")
    store = DiskStore(tmp_path, "k", lambda text: None)
    for unit in range(300):
        store.put(unit, {"x": torch.full((2, 8), float(unit))})
    shapes = {"x": (torch.float32, (2, 8))}
    assert all(float(found["x"][1, 3]) == unit for unit in range(300) if (found := store.get(unit, shapes)) is not None)
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_a_later_run_never_calls_a_layer_of_the_trunk(tmp_path: Path) -> None:
    built(tmp_path)
    model, documents = adapted("llama", byway.LoRA(rank=3, targets="all-linear", layers="2-")), Documents("llama")
    with cache_in(tmp_path, model=model, documents=documents) as cache:
        cache.states([0])
        tiny.randomize(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed=9)
        calls: list[int] = []
        for layer in model.model.layers[:2]:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(lambda *_: calls.append(1))
        for indices in ([8, 1], [0, 2, 3], [4, 5, 6, 7]):
            with cache.replay(indices):
                model(**documents.padded(indices)).logits.sum().backward()
        assert not calls and cache.computed == 0
