"""A file format is one file: dropped into the registered folder it is used, and nothing else has to change."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import byway
import byway.formats as package
from byway.errors import AdapterError
from byway.formats import formats
from byway.formats.format import Format
from tests.tiny import build, inputs, randomize

TOY = '''
"""A toy format: JSON, for LoRA alone."""

import json

import torch

from byway.core.attach import planned
from byway.core.method import BuildContext
from byway.formats.directory import README, write
from byway.formats.format import Format, Loaded
from byway.methods.lora import LoRA


class Toy(Format):
    order = 5
    label = "toy"
    files = ("toy.json",)

    def declines(self, adapter):
        return "" if isinstance(adapter.method, LoRA) else "only LoRA"

    def save(self, adapter, directory, tokenizer):
        state = {f"{site.path}:{name}": t.tolist() for site, side in adapter.side_paths() for name, t in side.state_dict().items()}
        write(directory, {"toy.json": json.dumps({"rank": adapter.method.rank, "state": state}), README: "toy"}, {})

    def load(self, model, directory, options):
        content = json.loads((directory / "toy.json").read_text())
        plan, notes = planned(model, LoRA(rank=content["rank"]), BuildContext(generator=torch.Generator()))
        for site, side in plan:
            side.load_state_dict({name: torch.tensor(content["state"][f"{site.path}:{name}"]) for name in side.state_dict()})
        return Loaded(LoRA(rank=content["rank"]), plan, [*notes, "read by the toy"])
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "more_formats"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "byway.formats.toy", raising=False)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("byway.formats.toy", None)


def test_the_formats_and_their_order() -> None:
    assert [type(format).__name__ for format in formats()] == ["AdapterHub", "Peft", "Native"]
    for format in formats():
        assert not inspect.isabstract(type(format)) and isinstance(format, Format)
        assert format.label and len(format.files) >= 2 and len(set(format.files)) == len(format.files)
        assert inspect.getdoc(type(format))


def test_a_file_in_the_folder_is_a_format(toy: Path, tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, byway.LoRA(rank=2, modules_to_save="none"))
    randomize(adapter.named_parameters())
    expected = model(**x).logits
    saved = adapter.save(tmp_path / "saved")
    assert {entry.name for entry in saved.iterdir()} == {"toy.json", "README.md"}
    byway.detach(model)
    loaded = byway.load(model, saved)
    assert "read by the toy" in loaded.notes
    assert torch.equal(model(**x).logits, expected)


def test_what_it_declines_goes_to_the_next_and_its_directory_is_known(toy: Path, tmp_path: Path) -> None:
    model = build("llama")
    lora = byway.attach(model, byway.LoRA(rank=2), name="lora").save(tmp_path / "saved")
    other = byway.attach(model, byway.BitFit(), name="other")
    assert other.save(lora) == lora  # another adapter's directory, so it may be replaced
    assert "byway_adapter.json" in {entry.name for entry in lora.iterdir()}
    (lora / "mine.txt").write_text("keep me")
    with pytest.raises(AdapterError, match=r"mine\.txt"):
        other.save(lora)


def test_without_the_file_nobody_reads_its_directory(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json; it holds: toy\.json"):
        byway.load(build("llama"), tmp_path)
