"""Directories that somebody else may have sent: whatever is wrong in them is an error of Byway's, by every reader of them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import byway
from byway.errors import BywayError
from byway.inference.runs import find
from byway.workshop.inspect import inspect_adapter
from tests.tiny import build

MISSING = object()
VALUES: list[Any] = [
    MISSING, None, [], {}, "", "x", "\0", "\ud800", "a:b", -1, 0, 1, 2.5, 1e308, float("inf"), float("nan"), 10**18, 10**400, 10**5000,
    True, [None], [[1]], ["q_proj", 3], [10**30], ["CAUSAL_LM"], {"q_proj": None}, {"q_proj": []}, {"q_proj": float("inf")},
    {"q_proj": 10**400}, {"(": 2}, {"a": {"b": []}},
]  # fmt: skip
METHODS: dict[str, tuple[str, Callable[[], byway.Method]]] = {
    "lora": ("llama", lambda: byway.LoRA(rank=2, trained_tokens=[1], bias="all", targets=["q_proj", "v_proj"])),
    "dora": ("llama", lambda: byway.DoRA(rank=2, targets=["q_proj"])),
    "adalora": ("llama", lambda: byway.AdaLoRA(targets=["q_proj"])),
    "ia3": ("llama", byway.IA3),
    "prefix": ("llama", lambda: byway.PrefixTuning(num_virtual_tokens=2)),
    "prompt": ("llama", lambda: byway.PromptTuning(num_virtual_tokens=2)),
    "bitfit": ("llama", byway.BitFit),
    "chain": ("llama", lambda: byway.WeightChain(targets=["q_proj"])),
    "bottleneck": ("bert", byway.BottleneckAdapter),
    "parallel": ("bert", byway.ParallelAdapter),
}
PER_KIND = 40
"""Mutations of each kind of file and method that a run of the tests draws."""


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {family: build(family) for family in ("llama", "bert")}


@pytest.fixture(params=METHODS)
def saved(request: pytest.FixtureRequest, models: dict[str, torch.nn.Module], tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    family, method = METHODS[request.param]
    model = models[family]
    directory = byway.attach(model, method()).save(tmp_path / "a")
    byway.detach(model)
    return model, directory


def attempt(model: torch.nn.Module, directory: Path, what: object) -> None:
    """Read the directory in every way; a BywayError is fine, anything else is not."""
    for reader in (lambda: byway.load(model, directory), lambda: inspect_adapter(directory).to_dict(), lambda: find(directory)):
        try:
            reader()
        except BywayError as error:
            assert error.exit_code == 2 and str(error).encode("utf-8", "replace")
        except Exception as error:
            pytest.fail(f"{what!r:.300}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            for name in list(byway.adapters(model)):
                byway.detach(model, name)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index below `value`, of long lists and maps the first four."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    entries = list(entries)
    for key, inner in entries if len(prefix) < 2 else entries[:4]:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = deepcopy(content)
    owner = copy
    for key in place[:-1]:
        owner = owner[key]
    if value is MISSING:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return copy


def text(value: Any) -> str:
    """JSON of `value`, also with integers of more digits than Python writes."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


def drawn(content: Any, seed: int) -> list[tuple[tuple[Any, ...], Any]]:
    everything = [(place, value) for place in places(content) for value in VALUES]
    return random.Random(seed).sample(everything, min(PER_KIND, len(everything)))


def test_every_value_of_a_configuration(saved: tuple[torch.nn.Module, Path], seed: int) -> None:
    model, directory = saved
    for file in directory.glob("*.json"):
        content = json.loads(file.read_text())
        for place, value in drawn(content, seed):
            file.write_text(text(changed(content, place, value)), encoding="utf-8")
            attempt(model, directory, (file.name, place, value))
        file.write_text(json.dumps(content))


def test_every_value_of_the_record(saved: tuple[torch.nn.Module, Path], seed: int) -> None:
    model, directory = saved
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        record = json.loads(stream.metadata()["byway"])
    for place, value in drawn(record, seed):
        save_file(tensors, file, {"byway": text(changed(record, place, value))})
        attempt(model, directory, ("record", place, value))
    for whole in ("", "null", "[]", '"a"', "1e999", "{", "{}", '{"format": 1}', "[" * 100_000, '{"format": NaN}'):
        save_file(tensors, file, {"byway": whole})
        attempt(model, directory, ("record", whole[:20]))


def test_every_kind_of_tensor(saved: tuple[torch.nn.Module, Path]) -> None:
    model, directory = saved
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    name, tensor = next(iter(tensors.items()))
    for other in (
        tensor.to(torch.int8), tensor.bool(), tensor.to(torch.float8_e4m3fn), tensor.to(torch.complex64), tensor[None], tensor.reshape(-1),
        torch.zeros(()), torch.zeros(0), torch.zeros(0, 4), torch.full_like(tensor, float("nan")), torch.full_like(tensor, 1e38),
        tensor.half(), tensor.double() * 1e300,
    ):  # fmt: skip
        save_file(tensors | {name: other.contiguous()}, file)
        attempt(model, directory, (name, other.dtype, other.shape))
    rest = {key: value for key, value in tensors.items() if key != name}
    for other in ("", "a", "\0", f"{'a.' * 3000}weight", f"model.layers.{'9' * 5000}.q_proj.lora_A.weight", "é.lora_A.weight"):
        save_file(rest | {other: tensor}, file)
        attempt(model, directory, other)


def test_every_byte_of_a_tensor_file(saved: tuple[torch.nn.Module, Path], seed: int) -> None:
    model, directory = saved
    file = next(directory.glob("*.safetensors"))
    data, draw = file.read_bytes(), random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    for number in range(PER_KIND):
        damaged = bytearray(data)
        damaged[draw.randrange(8 + length if number % 2 else 8)] = draw.randrange(256)
        file.write_bytes(bytes(damaged if number % 4 else damaged[: draw.randrange(len(data))]))
        attempt(model, directory, ("byte", number))
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    kinds = ("F4", "F8_E8M0", "U64", "C64", "F6_E2M3", "Q8", None, 3)
    changes: list[tuple[tuple[str, ...], Any]] = [((first, "dtype"), kind) for kind in kinds]
    changes += [((first, "shape"), shape) for shape in (None, [-1], [2**63], [1e3], ["a"], [], [0])]
    changes += [((first, "data_offsets"), ends) for ends in (None, [0], [5, 1], [-1, 4], [0, 2**62], ["a", "b"])]
    changes += [(("__metadata__",), metadata) for metadata in (None, [], {"a": 1}, "x", {"byway": None})]
    for place, value in changes:
        head = json.dumps(changed(header, place, value)).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
        attempt(model, directory, (place, value))
