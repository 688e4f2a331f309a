"""Checks 21-34: adapter files."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import byway
from byway.core.disk.files import read_safetensors
from tests.reliability.table import Action, Case, Later, World, check

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def weights(change: Callable[[bytes], bytes], *says: str, seconds: float | None = None, command: str = "generate") -> Case:
    """An adapter whose weight file has these bytes."""

    def make(world: World) -> Action:
        file = world.own_adapter() / WEIGHTS
        file.write_bytes(change(file.read_bytes()))
        return world.use("adapter") if command == "generate" else [command, "adapter"]

    return Case(make=make, says=(WEIGHTS, *says), seconds=seconds)


def header(entries: Any, data: bytes = b"\0" * 16) -> bytes:
    content = json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def foreign(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the tensors as another program would, without our record of the hash and the base."""
    from safetensors.torch import load_file, save_file

    save_file({k: v.contiguous() for k, v in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS, {"format": "pt"})


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], *says: str, code: int = 2) -> Case:
    def make(world: World) -> Action:
        foreign(world.own_adapter(), change)
        return world.use("adapter")

    return Case(make=make, code=code, says=says)


def config(content: str | bytes | None, *says: str) -> Case:
    """An adapter whose configuration file has this content or is missing."""

    def make(world: World) -> Action:
        file = world.own_adapter() / CONFIG
        file.unlink()
        if content is not None:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return world.use("adapter")

    return Case(make=make, says=(CONFIG, *says))


def fields(*says: str, code: int = 2, **changes: Any) -> Case:
    def make(world: World) -> Action:
        file = world.own_adapter() / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return world.use("adapter")

    return Case(make=make, code=code, says=says)


def other_base(*says: str, record: bool = True, **changes: Any) -> Case:
    """The adapter on a base of another shape, with or without our record of its own base."""

    def make(world: World) -> Action:
        from byway.base.quiet import quiet
        from tests.reliability.conftest import llama

        base = world.own_base()
        with quiet():
            llama(**changes).save_pretrained(base)
        adapter = world.own_adapter()
        if not record:
            foreign(adapter, dict)
        return world.use("adapter", base)

    return Case(make=make, says=says)


def infinite(world: World) -> Path:
    adapter = world.own_adapter()
    foreign(adapter, lambda t: t | {Q.format("A"): t[Q.format("A")] * float("nan")})
    return adapter


def pickled(world: World) -> Action:
    adapter = world.own_adapter()
    (adapter / WEIGHTS).unlink()
    world.write("adapter/adapter_model.bin", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    return world.use("adapter")


def pickle_beside(world: World) -> Action:
    world.own_adapter()
    world.write("adapter/adapter_model.bin", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    return world.use("adapter")


def as_zip(world: World) -> Action:
    with zipfile.ZipFile(world.root / "adapter.zip", "w") as archive:
        archive.writestr("../escaped", "x")
        archive.writestr(CONFIG, "{}")
    return world.use("adapter.zip")


def as_tar(world: World) -> Action:
    with tarfile.open(world.root / "adapter.tar", "w") as archive:
        for name, kind, target in (
            ("/absolute", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "/etc/passwd"),
            ("dev", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member, io.BytesIO())
    return world.use("adapter.tar")


def archive_as_weights(world: World) -> Action:
    as_zip(world)
    adapter = world.own_adapter()
    (adapter / WEIGHTS).write_bytes((world.root / "adapter.zip").read_bytes())
    return world.use("adapter")


def saved_onto_itself(world: World) -> Action:
    """Overwrite the loaded file; a reader that has it mapped keeps its values."""
    adapter = world.own_adapter()
    mapped, _ = read_safetensors(adapter / WEIGHTS)
    before = {name: tensor.clone() for name, tensor in mapped.items()}
    model = byway.load_base(world.shared.base)[0]

    def act() -> None:
        loaded = byway.load(model, adapter, trainable=True)
        loaded.save(adapter)
        with torch.no_grad():
            for _, parameter in loaded.named_parameters():
                parameter.zero_()
        assert all(torch.equal(mapped[name], tensor) for name, tensor in before.items())
        again, _ = read_safetensors(adapter / WEIGHTS)
        assert again.keys() == before.keys() and all(torch.equal(again[name], tensor) for name, tensor in before.items())
        print("equal")

    return act


def merge_infinite(world: World) -> Action:
    infinite(world)
    return ["merge", "adapter", "--base", str(world.own_base()), "-o", "merged"]


NEWER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_version": "0.99.0", "warp": {"speed": 9}}

CHECKS = [
    check(
        21,
        "weights that are cut, or longer than they say",
        "tests/core/disk/test_files.py::test_a_cut_file_is_called_truncated_by_name",
        one_byte=weights(lambda data: data[:-1], "truncated"),
        half=weights(lambda data: data[: len(data) // 2], "truncated"),
        header=weights(lambda data: data[:100], "truncated"),
        four_bytes=weights(lambda data: data[:4], "truncated"),
        nothing=weights(lambda data: b"", "truncated"),
        two_more=weights(lambda data: data + b"..", "2 bytes more"),
        inspected=weights(lambda data: data[:-1], "truncated", command="inspect"),
    ),
    check(
        22,
        "a hostile header",
        "tests/core/disk/test_files.py::test_hostile_headers_are_refused_by_name_quickly",
        "tests/core/disk/test_files.py::test_flipped_bytes_are_read_or_refused_but_never_anything_else",
        **{
            name: weights(lambda _, content=content: content, seconds=1, command="inspect")
            for name, content in {
                "length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
                "200 MB": (200 * 2**20).to_bytes(8, "little") + b" " * 100,
                "overlap": header({"a": entry("F32", [3], 0, 12), "b": entry("F32", [2], 8, 16)}),
                "hole": header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 12, 16)}),
                "past the end": header({"a": entry("F32", [5], 0, 20)}),
                "dtype": header({"a": entry("X9", [4], 0, 16)}),
                "overflow": header({"a": entry("F32", [2**40, 2**40], 0, 16)}),
            }.items()
        },
    ),
    check(
        23,
        "a configuration that is missing or no JSON object",
        "tests/core/disk/test_files.py::test_bad_json_is_refused_by_file_and_reason",
        missing=config(None, WEIGHTS),
        not_json=config("{'r': 4}", "JSON"),
        cut=config('{"peft_type": "LORA", '),
        list=config("[]"),
        empty_object=config("{}", "peft_type"),
        empty=config(""),
        byte_order_mark=config(b'\xef\xbb\xbf{"peft_type": "LORA"}', "byte-order mark"),
        twice=config('{"peft_type": "LORA", "r": 4, "r": 8}', "'r'"),
    ),
    check(24, "an unknown peft_type", unknown=fields(CONFIG, "'LORRA'", "did you mean 'LORA'?", peft_type="LORRA")),
    check(
        25,
        "fields of a newer version",
        "tests/formats/test_strict.py::test_fields_of_a_newer_peft_are_refused_unless_off_or_allowed",
        active=config(json.dumps(NEWER), "warp", "0.99.0", "0.21"),
        idle=fields("warp", code=0, warp=None),
    ),
    check(
        26,
        "weights of another rank than the configuration's; a transposed factor",
        rank=fields(WEIGHTS, Q.format("A"), "[4, 32]", "[8, 32]", r=8),
        transposed=tensors(lambda t: t | {Q.format("A"): t[Q.format("A")].T}, WEIGHTS, Q.format("A"), "[32, 4]", "[4, 32]"),
    ),
    check(
        27,
        "none of the tensors is found",
        empty=tensors(lambda t: {}, WEIGHTS, "0 of 8 tensors found"),
        renamed=tensors(lambda t: {f"model.{key}": value for key, value in t.items()}, WEIGHTS, "0 of 8 tensors found", "8 others"),
    ),
    check(
        28,
        "tensors that do not belong to the adapter",
        "tests/formats/test_strict.py::test_a_base_layer_that_is_no_vocabulary_is_not_let_in",
        head=tensors(lambda t: t | {"base_model.model.lm_head.weight": torch.ones(264, 32)}, "base_model.model.lm_head.weight"),
        norm=tensors(lambda t: t | {"base_model.model.model.norm.weight": torch.ones(32)}, "base_model.model.model.norm.weight"),
        fewer_listed=fields("4 tensors do not belong", "v_proj", target_modules=["q_proj"]),
        many=tensors(lambda t: t | {f"base_model.model.x{i}.weight": torch.ones(1) for i in range(12)}, "12 tensors", "… 2 more"),
    ),
    check(
        29,
        "a base of another shape",
        more_layers=other_base("another base", "layers", num_hidden_layers=3),
        fewer_layers=other_base("another base", "layers", num_hidden_layers=1),
        other_size=other_base("another base", "hidden", hidden_size=64),
        more_layers_no_record=other_base(WEIGHTS, "layers.2", record=False, num_hidden_layers=3),
        fewer_layers_no_record=other_base(WEIGHTS, "layers.1", record=False, num_hidden_layers=1),
        other_size_no_record=other_base(WEIGHTS, "[4, 64]", record=False, hidden_size=64),
    ),
    check(
        30,
        "tensors of other types",
        "tests/formats/test_strict.py::test_other_floats_are_converted_and_noted",
        "tests/core/disk/test_files.py::test_tensors_keep_values_and_dtypes_even_when_they_share_memory",
        int8=tensors(lambda t: t | {Q.format("A"): t[Q.format("A")].to(torch.int8)}, Q.format("A"), "int8"),
        complex64=tensors(lambda t: t | {Q.format("A"): t[Q.format("A")].to(torch.complex64)}, Q.format("A"), "complex64"),
        float64=tensors(lambda t: {k: v.double() for k, v in t.items()}, "8 tensors", "float64", code=0),
        bfloat16=tensors(lambda t: {k: v.bfloat16() for k, v in t.items()}, "8 tensors", "bfloat16", code=0),
    ),
    check(
        31,
        "NaN in an adapter",
        "tests/core/test_core.py::test_a_merge_that_would_not_be_finite_leaves_the_base_bit_identical",
        loaded=Case(make=lambda world: world.use(infinite(world)), says=(WEIGHTS, "NaN", Q.format("A"))),
        merged=Case(make=merge_infinite, says=("NaN",)),
        infinity=tensors(lambda t: t | {Q.format("B"): t[Q.format("B")] / 0.0}, "infinity", Q.format("B")),
    ),
    check(
        32,
        "weights as a pickle",
        pickle_only=Case(make=pickled, says=("adapter_model.bin", "pickle", "never opened")),
        beside=Case(make=pickle_beside, code=0, says=()),
        renamed=weights(lambda _: b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."),
    ),
    check(
        33,
        "an archive in place of an adapter",
        "tests/formats/test_strict.py::test_a_file_in_place_of_a_directory_is_refused",
        Later("archives are never unpacked, so nothing can leave the target or fill the disk: a file is refused as such"),
        zip=Case(make=as_zip, says=("adapter.zip", "is a file", "directory")),
        tar=Case(make=as_tar, says=("adapter.tar", "is a file", "directory")),
        as_weights=Case(make=archive_as_weights, says=(WEIGHTS,)),
    ),
    check(
        34,
        "an adapter that is loaded and saved onto itself",
        "tests/core/disk/test_files.py::test_saving_onto_the_file_just_read_keeps_the_values",
        same_path=Case(make=saved_onto_itself, code=0, says=("equal",), writes=True),
    ),
]
