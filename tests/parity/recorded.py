"""Outputs and files of the adapters library, recorded by tests/golden/record_adapters.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import byway
from tests.parity.cells import Between, Cell, Cells, relative

_FILE = Path(__file__).parent.parent / "golden" / "record_adapters.py"


def _recorder() -> Any:
    spec = importlib.util.spec_from_file_location("record_adapters", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


R = _recorder()
VERSIONS: dict[str, Any] = json.loads((R.HERE / "versions.json").read_text())


def measure(family: str, adapters: tuple[str, ...], between: Between | None = None) -> list[Cells]:
    """Measure ``forward`` (our logits with their files) and ``files`` (also their recorded logits with our files)."""
    reference, found = load_file(R.HERE / family / "reference.safetensors"), []
    for name in adapters:
        if R.wanted(family, name):
            model = R.load(family)
            adapter = byway.load(model, R.HERE / family / name)
            if between is not None:
                between(adapter)
            expected = reference[f"out.{name}"]
            error, back = relative(R.logits(model, family), expected), VERSIONS["read"][f"{family}/{name}"] / float(expected.abs().max())
            found.append({"forward": Cell(error), "files": Cell(max(error, back))})
    return found
