"""What modules are called in files: held against the files that transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from byway.core.families import checkpoint_name, checkpoint_names, module_path
from byway.core.slots import base_modules
from byway.errors import TargetError
from tests import zoo

torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_checkpoint_names_are_those_in_the_file(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = checkpoint_names(model)
    checked = 0
    for path, module in base_modules(model):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        there = names[path]
        if there is None:
            assert not any(t.shape == weight.shape and torch.equal(t, weight) and weight.std() > 0 for t in stored.values()), path
            continue
        assert module_path(model, there) == path
        key = f"{there}.weight" if there else "weight"
        if key not in stored:  # a tied weight is stored once, a computed one not at all
            assert not weight.requires_grad or sum(other is weight for m in model.modules() for other in m._parameters.values()) > 1, key
            continue
        assert torch.equal(stored[key], weight), path
        checked += 1
    assert checked >= 10


def test_names_that_differ_are_translated_both_ways() -> None:
    vit = zoo.shared("vit")
    path, there = "vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attention.attention.query"
    assert checkpoint_name(vit, path) == there
    assert module_path(vit, there) == path
    assert module_path(vit, path) == path
    assert checkpoint_name(zoo.shared("mixtral"), "model.layers.0.mlp.experts") is None
    with pytest.raises(TargetError, match=r"did you mean 'vit\.layers\.0\.attention\.q_proj'"):
        checkpoint_name(vit, "vit.layers.0.attention.q_prj")
    with pytest.raises(TargetError, match="neither a checkpoint name nor a module path"):
        module_path(vit, "vit.encoder.layer.9.attention.attention.query")


def test_names_do_not_depend_on_how_a_model_came_into_memory(tmp_path: Path) -> None:
    model = zoo.build("vit")
    names = checkpoint_names(model)
    model.save_pretrained(tmp_path / "renamed", save_original_format=False)
    assert checkpoint_names(type(model).from_pretrained(tmp_path / "renamed")) == names
    model.save_pretrained(tmp_path / "original")
    assert checkpoint_names(type(model).from_pretrained(tmp_path / "original")) == names
