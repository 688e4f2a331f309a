"""Files of the adapters library, both directions, against what that library recorded (tests/golden/record_adapters.py)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import byway
from byway.formats.adapterhub import AdapterHub
from tests.tiny import build, inputs, randomize

_SPEC = importlib.util.spec_from_file_location("record_adapters", Path(__file__).parent.parent / "golden" / "record_adapters.py")
assert _SPEC is not None
assert _SPEC.loader is not None
R = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(R)

CASES = [(name, adapter) for name in R.MODELS for adapter in R.ADAPTERS if R.wanted(name, adapter)]
MAXIMUM = 1e-5  # float32 logits against another program


def reference(name: str) -> dict[str, torch.Tensor]:
    return load_file(R.HERE / name / "reference.safetensors")


def copied(tmp_path: Path, name: str = "bert", adapter: str = "double_seq_bn") -> Path:
    return Path(shutil.copytree(R.HERE / name / adapter, tmp_path / "adapter"))


def changed(directory: Path, **fields: Any) -> Path:
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"] |= fields
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", R.MODELS)
def test_the_bare_model_computes_what_it_did_there(name: str) -> None:
    assert (R.logits(R.load(name), name) - reference(name)["out.base"]).abs().max() < MAXIMUM


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_their_files_give_their_outputs(name: str, adapter: str) -> None:
    model, recorded = R.load(name), reference(name)
    byway.load(model, R.HERE / name / adapter)
    found = R.logits(model, name)
    assert (found - recorded[f"out.{adapter}"]).abs().max() < MAXIMUM
    assert (found - recorded["out.base"]).abs().max() > 1e-2
    with byway.disabled(model):
        assert (R.logits(model, name) - recorded["out.base"]).abs().max() < MAXIMUM


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_our_files_say_what_theirs_say(name: str, adapter: str, tmp_path: Path) -> None:
    theirs = R.HERE / name / adapter
    ours = byway.load(R.load(name), theirs, "task").save(tmp_path / "adapter")
    for file in ("adapter.safetensors", *(["model_head.safetensors"] if (ours / "model_head.safetensors").exists() else [])):
        expected, found = load_file(theirs / file), load_file(ours / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for file in ("adapter_config.json", *(["head_config.json"] if (ours / "head_config.json").exists() else [])):
        expected, found = (json.loads((where / file).read_text()) for where in (theirs, ours))
        expected["model_name"] = found["model_name"] = ""  # where the base happened to lie
        if file == "adapter_config.json" and expected["config"]["is_parallel"] is False:
            assert found["config"].pop("init_weights") == expected["config"].pop("init_weights")
        assert found == expected
    # what the library has loaded, with equal outputs, is what is written today
    assert R.content(ours) == json.loads((R.HERE / name / "ours.json").read_text())[adapter]


def test_the_library_has_loaded_our_files_with_equal_outputs() -> None:
    versions = json.loads((R.HERE / "versions.json").read_text())
    assert versions["adapters"] == "1.3.0"
    assert versions["read"].keys() == {f"{name}/{adapter}" for name, adapter in CASES}
    assert all(difference < MAXIMUM for difference in versions["read"].values())


def test_a_trained_head_comes_along_and_a_frozen_one_does_not(tmp_path: Path) -> None:
    adapter = byway.load(R.load("roberta"), R.HERE / "roberta" / "double_seq_bn")
    assert adapter.method.modules_to_save == ("classifier",)
    decoder = byway.load(R.load("llama"), R.HERE / "llama" / "double_seq_bn")  # its head file holds the base's own head
    assert decoder.method.modules_to_save == "none"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_the_format_holds_is_saved_in_it_and_the_rest_in_our_own(family: str, tmp_path: Path) -> None:
    pfeiffer = byway.attach(build(family), byway.BottleneckAdapter(variant="pfeiffer")).save(tmp_path / "a")
    assert (pfeiffer / "adapter.safetensors").exists()
    for i, method in enumerate(
        (
            byway.BottleneckAdapter(),  # trained norms
            byway.BottleneckAdapter(norms=False, layer_norm="in"),
            byway.BottleneckAdapter(norms=False, exclude=r".*\.0\.(mlp|output\.dropout)"),
        )
    ):
        model = build(family)
        adapter = byway.attach(model, method)
        randomize(adapter.named_parameters())
        assert AdapterHub().declines(adapter)
        assert (adapter.save(tmp_path / f"{i}") / "byway_adapter.json").exists()
        other = build(family)
        byway.load(other, tmp_path / f"{i}")
        assert torch.equal(other(**inputs(family)).logits, model(**inputs(family)).logits)


def test_a_parallel_adapter_on_a_prenorm_model_is_theirs_only_when_it_reads_the_residual() -> None:
    assert AdapterHub().declines(byway.attach(build("llama"), byway.ParallelAdapter()))
    assert not AdapterHub().declines(byway.attach(build("llama"), byway.ParallelAdapter(reads="residual")))
    assert not AdapterHub().declines(byway.attach(build("bert"), byway.ParallelAdapter()))


@pytest.mark.parametrize("size", [1, 3, 5, 7, 11, 13, 32])
def test_a_size_that_divides_nothing_is_written_as_a_factor_that_gives_it(size: int, tmp_path: Path) -> None:
    path = byway.attach(build("bert"), byway.BottleneckAdapter(size=size, norms=False)).save(tmp_path / "a")
    factor = json.loads((path / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert int(32 // factor) == size


def test_files_of_a_model_without_head_load_into_one_with_head(tmp_path: Path) -> None:
    directory = copied(tmp_path, adapter="seq_bn")
    tensors = load_file(directory / "adapter.safetensors")
    save_file({key.removeprefix("bert."): tensor for key, tensor in tensors.items()}, directory / "adapter.safetensors")
    model = R.load("bert")
    byway.load(model, directory)
    assert (R.logits(model, "bert") - reference("bert")["out.seq_bn"]).abs().max() < MAXIMUM


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_gating": True}, "use_gating"),
        ({"phm_layer": True}, "phm_layer"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"original_ln_after": False}, "original_ln_after"),
        ({"residual_before_ln": "post_add", "original_ln_before": True}, "residual_before_ln"),
        ({"architecture": "lora"}, "no bottleneck adapter"),
        ({"scaling": "channel"}, "scaling"),
        ({"non_linearity": "mish"}, "non_linearity"),
        ({"reduction_factor": {"default": 4}}, "reduction_factor"),
        ({"reduction_factors": 4}, "did you mean 'reduction_factor'"),
        ({"leave_out": [0, 1]}, "leaves no layer"),
        ({"leave_out": [1]}, "do not belong"),
        ({"output_adapter": False}, "do not belong"),
        ({"mh_adapter": False, "output_adapter": False}, "no place"),
        ({"reduction_factor": 8}, "wrong shapes"),
        ({"ln_after": True}, "missing"),
        ({"is_parallel": True}, "parallel"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_is_untouched(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    directory = changed(copied(tmp_path), **fields)
    model = R.load("bert")
    before = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).digest()
    with pytest.raises(byway.AdapterError, match=says):
        byway.load(model, directory)
    assert byway.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())
    assert hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).digest() == before


def test_broken_tensors_pickles_and_other_bases_are_refused(tmp_path: Path) -> None:
    directory = copied(tmp_path)
    tensors = load_file(directory / "adapter.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] * float("nan")}, directory / "adapter.safetensors")
    with pytest.raises(byway.AdapterError, match="NaN"):
        byway.load(R.load("bert"), directory)
    (directory / "adapter.safetensors").rename(directory / "pytorch_adapter.bin")
    with pytest.raises(byway.AdapterError, match="pickle"):
        byway.load(R.load("bert"), directory)
    with pytest.raises(byway.AdapterError, match="made for a 'bert' model, this is a 'roberta'"):
        byway.load(R.load("roberta"), R.HERE / "bert" / "seq_bn")


def test_a_head_of_the_librarys_own_kind_is_noted(tmp_path: Path) -> None:
    directory = copied(tmp_path)
    about = json.loads((directory / "head_config.json").read_text())
    (directory / "head_config.json").write_text(json.dumps(about | {"model_class": "BertAdapterModel", "config": {"head_type": "x"}}))
    adapter = byway.load(R.load("bert"), directory)
    assert any("head" in note for note in adapter.notes)
    assert adapter.method.modules_to_save == "none"
