"""A lever is one file: a toy one, outside the package, is tested, used, shown and refused like the built-in ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import byway
from byway.train.levers import choose
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, losses, write_rows, write_tokenizer

pytestmark = pytest.mark.usefixtures("quick_picture")
BUILT_IN = ("pack", "labels_only", "frontier", "recompute", "share_prefix", "last_layer", "checkpointing")
TOY = '''
"""Counts forward passes; `FACTOR` other than 1 makes it wrong."""

from contextlib import contextmanager

from byway.train.levers.lever import Lever

ENTERED = []
FACTOR = {factor}


class {name}(Lever):
    """A toy."""

    key = "{key}"
    place = 35
    stage = "{stage}"

    @contextmanager
    def on(self, model):
        ENTERED.append(self.key)
        handle = model.model.layers[0].register_forward_hook(lambda module, args, out: out * FACTOR)
        try:
            yield
        finally:
            handle.remove()

    def line(self, model):
        return "a toy"
'''


def toy(folder: Path, file: str = "toy", *, name: str = "Toy", key: str = "toy", factor: float = 1.0, stage: str = "first") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{file}.py").write_text(TOY.format(name=name, key=key, factor=factor, stage=stage), encoding="utf-8")


def test_the_levers_are_the_files_of_the_folder_in_the_order_in_which_they_act() -> None:
    assert choose.keys() == BUILT_IN
    for lever in choose.levers():
        assert type(lever).__module__ == f"byway.train.levers.{lever.key}"


@pytest.mark.parametrize("stage", ["first", "packed", "last"])
def test_a_lever_of_ones_own_is_named_by_import_path_and_changes_no_loss(
    stage: str, make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{stage}"
    toy(tmp_path / "mine", name, stage=stage)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    plain = byway.train(make_recipe("plain"))
    own = make_recipe("own", engine={"levers": [f"{name}:Toy"]})
    assert "toy on" in prepare(byway.Recipe.from_dict(own), note=lambda text: None).plan.levers
    before = len(sys.modules[name].ENTERED)
    assert before > 0, "tested on the probe"
    run = byway.train(own)
    assert len(sys.modules[name].ENTERED) > before + 1, "in effect while training"
    assert [row["loss"] for row in losses(run.directory)] == [row["loss"] for row in losses(plain.directory)]


def test_a_file_in_the_folder_is_a_lever(make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = sys.modules["byway.train.levers"]
    toy(tmp_path / "more", "counted", name="Counted", key="counted")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "more")])
    assert choose.keys() == (*BUILT_IN[:4], "counted", *BUILT_IN[4:])
    session = prepare(byway.Recipe.from_dict(make_recipe()), note=lambda text: None)
    assert "counted on (a toy)" in session.plan.levers
    monkeypatch.delitem(sys.modules, "byway.train.levers.counted")


@pytest.mark.parametrize("stage", ["first", "packed", "last"])
def test_a_wrong_lever_is_switched_off_and_named_and_the_others_stay_on(
    stage: str, make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"wrong_{stage}"
    toy(tmp_path / "mine", name, factor=1.5, stage=stage)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    session = prepare(byway.Recipe.from_dict(make_recipe(engine={"levers": [f"{name}:Toy"]})), note=lambda text: None)
    assert "toy off (it does not reproduce the plain loss here" in session.plan.levers
    assert session.engaged.packed and session.engaged.has("frontier")
    assert not session.engaged.has("toy")


def test_a_path_that_leads_to_no_lever_is_refused_before_anything_is_written(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(byway.ConfigError, match="no_such_module"):
        byway.train(make_recipe(engine={"levers": ["no_such_module:Toy"]}))
    with pytest.raises(byway.ConfigError, match="has no Lever named 'OrderedDict'"):
        byway.train(make_recipe(engine={"levers": ["collections:OrderedDict"]}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["pack", "labels_only", "frontier", "recompute", "share_prefix", "last_layer", "checkpointing"])
def test_dropout_in_the_adapter_and_in_the_base_keeps_no_lever_off(key: str, make_recipe: RecipeMaker, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    config = GPT2Config(vocab_size=64, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=1, eos_token_id=2, **sizes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    ids = [[*range(10, 20), *(20 + (i * 7 + j) % 40 for j in range(3 + i % 4))] for i in range(24)]
    rows = [{"input_ids": row, "labels": [*[-100] * 10, *row[10:]]} for row in ids]
    recipe = make_recipe(method={"dropout": 0.1}, base={"model": str(tmp_path / "base")}, engine={key: "on"})
    recipe["data"]["train"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    session = prepare(byway.Recipe.from_dict(recipe), note=lambda text: None)
    assert session.engaged.has(key), session.plan.levers
