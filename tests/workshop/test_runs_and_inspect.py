"""What a directory is, and what is in an adapter's files without its base."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from byway import AdapterError, ConfigError, LoRA, attach, load_base
from byway.core.disk.files import read_safetensors, write_safetensors
from byway.inference.runs import find
from byway.workshop.inspect import inspect_adapter
from tests.workshop.conftest import adapter_for, moved_off_zero

RECIPE = "base: {{model: {base}}}\nmethod: {{name: lora}}\ndata: {{train: rows.jsonl, task: chat}}\noutput: run\n"


@pytest.fixture
def run(chat_base, chat_adapter, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(chat_adapter, folder / "adapter")
    shutil.copytree(chat_adapter, folder / "checkpoints" / "step-5" / "adapter")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=json.dumps(str(chat_base))))
    return folder


def test_a_run_a_checkpoint_and_an_adapter_are_told_apart(run, chat_base, chat_adapter):
    for place, adapter in (
        (run, run / "adapter"),
        (run / "checkpoints" / "step-5", run / "checkpoints" / "step-5" / "adapter"),
        (run / "adapter", run / "adapter"),
        (run / "checkpoints" / "step-5" / "adapter", run / "checkpoints" / "step-5" / "adapter"),
    ):
        found = find(place)
        assert [*found.adapters.values()] == [adapter] and found.base == str(chat_base)
        assert found.recipe is not None and found.run is not None and found.run.resolve() == run.resolve()
    bare = find(chat_adapter)
    assert bare.recipe is None and [*bare.adapters.values()] == [chat_adapter]
    assert find(run, base="elsewhere").base == "elsewhere"


def test_several_adapters_come_in_hook_order(run, chat_base, tmp_path):
    model, _ = load_base(chat_base)
    shutil.rmtree(run / "adapter")
    for name in ("lora-2", "lora"):
        attach(model, LoRA(rank=2, targets=["q_proj"]), name).save(run / "adapter" / name)
    text = (run / "recipe.yaml").read_text().replace("{name: lora}", "[{name: lora}, {name: lora}]")
    (run / "recipe.yaml").write_text(text)
    found = find(run)
    assert list(found.adapters) == ["lora", "lora-2"]


def test_what_is_missing_is_named_with_what_is_there(run, chat_base, tmp_path):
    with pytest.raises(ConfigError, match="does not exist") as raised:
        find(tmp_path / "rum")
    assert "run" in raised.value.hint
    with pytest.raises(ConfigError, match="is a file"):
        find(run / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"is a model, not a run.*config\.json"):
        find(chat_base)
    shutil.rmtree(run / "adapter")
    with pytest.raises(ConfigError, match=r"a run without an adapter.*checkpoints"):
        find(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it is empty"):
        find(tmp_path / "empty")


def test_an_adapter_that_names_no_base_asks_for_one(chat_adapter):
    config = json.loads((chat_adapter / "adapter_config.json").read_text())
    (chat_adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not record its base") as raised:
        find(chat_adapter).load()
    assert "--base" in raised.value.hint


# ------------------------------------------------------------ inspect


def test_norms_are_those_of_the_dense_updates(chat_base, tmp_path, seed):
    path = adapter_for(
        chat_base, tmp_path / "a", targets=["q_proj", "embed_tokens", "up_proj"], rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 3}
    )
    facts = inspect_adapter(path)
    tensors, _ = read_safetensors(path / "adapter_model.safetensors")
    assert {m.path for m in facts.modules} == {
        *(f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")), "model.embed_tokens"
    }  # fmt: skip
    for module in facts.modules:
        rank, alpha = (2, 3.0) if "up_proj" in module.path else (4, 8.0)
        names = ("lora_embedding_A", "lora_embedding_B") if "embed" in module.path else ("lora_A.weight", "lora_B.weight")
        a, b = (tensors[f"base_model.model.{module.path}.{name}"].double() for name in names)
        assert module.rank == rank
        assert math.isclose(module.norm, float((alpha / rank * b @ a).norm()), rel_tol=1e-9)
    assert facts.ranks == {2: 2, 4: 3}
    assert facts.parameters == sum(t.numel() for t in tensors.values())
    assert facts.largest.norm == max(m.norm for m in facts.modules)
    rows = {row[0]: row for row in facts.coverage()}
    assert rows["model.layers.*.mlp.up_proj"][1:4] == (2, "0-1", "2")
    json.dumps(facts.to_dict(), allow_nan=False)


def test_an_untrained_module_and_a_broken_tensor_are_pointed_out(chat_adapter):
    file = chat_adapter / "adapter_model.safetensors"
    tensors, _ = read_safetensors(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    write_safetensors(file, tensors | {key: torch.zeros_like(tensors[key])})
    assert inspect_adapter(chat_adapter).zero == ("model.layers.0.self_attn.q_proj",)
    write_safetensors(file, tensors | {key: torch.full_like(tensors[key], math.nan)})
    facts = inspect_adapter(chat_adapter)
    assert facts.broken == (key,)
    json.dumps(facts.to_dict(), allow_nan=False)


def test_a_file_by_peft_is_read_the_same(chat_base, tmp_path, seed):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chat_base), LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], use_rslora=True)
    )
    moved_off_zero(theirs)
    theirs.save_pretrained(tmp_path / "p")
    facts = inspect_adapter(tmp_path / "p")
    delta = theirs.base_model.model.model.layers[1].self_attn.v_proj.get_delta_weight("default").detach().double()
    found = next(m for m in facts.modules if m.path == "model.layers.1.self_attn.v_proj")
    assert math.isclose(found.norm, float(delta.norm()), rel_tol=1e-5)
    assert any("no fingerprint" in note for note in facts.notes)


def test_an_empty_or_cut_file_is_refused(chat_adapter):
    file = chat_adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is truncated"):
        inspect_adapter(chat_adapter)
    write_safetensors(file, {})
    with pytest.raises(AdapterError, match="holds no tensor"):
        inspect_adapter(chat_adapter)
