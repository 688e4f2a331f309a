"""Byway's own format: any side path makes the round trip, and no file brings code in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import byway
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site
from byway.errors import AdapterError


class Scaled(SidePath):
    """y·(1 + gate·mask): `gate` is trained, `mask` is a persistent buffer of whole numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))
        self.register_buffer("mask", torch.arange(width))

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out * (1 + self.gate * self.mask)


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    layers: tuple[str, ...] = ("0",)
    strengths: dict[str, float] | None = None

    def plan(self, model: nn.Module) -> Placement:
        return Placement([Site(path, model.get_submodule(path)) for path in self.layers])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        assert isinstance(site.module, nn.Linear)
        return Scaled(site.module.out_features)


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Tensor]:
    model = network()
    adapter = byway.attach(model, Scale(layers=("0", "2"), strengths={"0": 2.0}, modules_to_save="none"))
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.normal_()
    return adapter.save(tmp_path / "a"), model(X)


def test_the_round_trip_is_exact_and_keeps_the_method(saved):
    folder, expected = saved
    assert not (folder / "adapter_config.json").exists(), "peft would read it"
    model = network()
    adapter = byway.load(model, folder, methods=(Scale,))
    assert torch.equal(model(X), expected) and not torch.equal(network()(X), expected)
    assert adapter.method == Scale(layers=("0", "2"), strengths={"0": 2.0}, modules_to_save="none")
    assert hash(adapter.method) is not None
    adapter.save(folder.parent / "b")
    for file in folder.iterdir():
        assert file.read_bytes() == (folder.parent / "b" / file.name).read_bytes(), file.name


def test_a_class_named_by_the_file_is_not_imported(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match="no code is imported") as caught:
        byway.load(network(), folder)
    assert "methods=(Scale,)" in caught.value.hint
    config = json.loads((folder / "byway_adapter.json").read_text())
    (folder / "byway_adapter.json").write_text(json.dumps(config | {"method": "this:Zen"}))
    with pytest.raises(AdapterError, match="this:Zen"):
        byway.load(network(), folder, methods=(Scale,))
    import sys

    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "no_such_method"}, "no_such_method"),
        ({"format": 2}, "format 2"),
        ({"fields": {"layer": ["0"]}}, "did you mean 'layers'"),
        ({"fields": {"layers": ["0"], "modules_to_save": "none"}}, "missing here: 2"),
        ({"sites": "0"}, "list of strings"),
    ],
)
def test_a_changed_configuration_is_refused(saved, changes, said):
    folder, _ = saved
    config = json.loads((folder / "byway_adapter.json").read_text())
    (folder / "byway_adapter.json").write_text(json.dumps(config | changes))
    model = network()
    with pytest.raises(AdapterError, match=said) as caught:
        byway.load(model, folder, methods=(Scale,))
    assert "byway_adapter.json" in str(caught.value)
    assert not byway.adapters(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "2:gate"}, "1 of 4 tensors are missing: 2:gate"),
        (lambda t: t | {"2:extra": torch.ones(1)}, "2:extra"),
        (lambda t: t | {"0:gate": torch.ones(5)}, r"\[5\], here it is \[6\]"),
        (lambda t: t | {"0:gate": torch.full((6,), float("nan"))}, "NaN"),
        (lambda t: t | {"0:gate": torch.ones(6, dtype=torch.int64)}, "int64"),
    ],
)
def test_changed_tensors_are_refused(saved, change, said):
    folder, _ = saved
    file = folder / "byway_adapter.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    model = network()
    with pytest.raises(AdapterError, match=said):
        byway.load(model, folder, methods=(Scale,))
    assert torch.equal(model(X), network()(X)) and not byway.adapters(model)


def test_another_base_is_refused(saved):
    folder, _ = saved
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(AdapterError, match="another base"):
        byway.load(other, folder, methods=(Scale,))
    byway.load(other, folder, methods=(Scale,), check_base=False)
