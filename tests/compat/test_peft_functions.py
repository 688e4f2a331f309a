"""Each function of peft's interface gives the same outputs as peft itself from the same tensors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import peft as theirs
import pytest
import torch
from torch import Tensor, nn

import byway.compat.peft as ours
from byway.compat.peft.session import Session
from byway.errors import AdapterError
from byway.workshop.combine import combine, low_rank_of
from tests import tiny

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "methods.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tokens() -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5))


def pair(library: ModuleType, base: Any, **options: Any) -> Any:
    """Return a model with two adapters, ``default`` and ``other``, with the same tensors in both libraries."""
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**config))
    model.add_adapter("other", library.LoraConfig(**config))
    for index, name in enumerate(("default", "other")):
        state = library.get_peft_model_state_dict(model, adapter_name=name)
        draw = torch.Generator().manual_seed(index)
        filled = {key: 0.2 * torch.randn(state[key].shape, generator=draw) for key in sorted(state)}
        library.set_peft_model_state_dict(model, filled, adapter_name=name)
    return model.eval()


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **options).logits


@pytest.fixture
def base(seed: int) -> Any:
    return tiny.llama().eval()


def both(base: Any, **options: Any) -> tuple[Any, Any]:
    return pair(theirs, base, **options), pair(ours, base, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_switching_disabling_and_deleting(base: Any) -> None:
    expected, found = both(base)
    outputs = []
    for model in (expected, found):
        first = logits(model)
        model.set_adapter("other")
        second = logits(model)
        model.base_model.set_adapter(["default", "other"])
        together = logits(model)
        with model.disable_adapter():
            bare = logits(model)
        model.delete_adapter("default")
        assert model.active_adapters == ["other"]
        outputs.append((first, second, together, bare, logits(model)))
    for own, their in zip(outputs[1], outputs[0], strict=True):
        close(own, their)
    assert torch.equal(outputs[1][3], logits(base))


@pytest.mark.parametrize("names", [None, ["default"], ["default", "other"]])
def test_merging_and_taking_it_back(base: Any, names: list[str] | None) -> None:
    expected, found = both(base)
    before, weights = logits(found), {k: v.clone() for k, v in base.state_dict().items()}
    expected.merge_adapter(names)
    found.merge_adapter(names)
    close(logits(found), logits(expected))
    layer = found.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == (names or ["default"])
    found.unmerge_adapter()
    assert torch.equal(logits(found), before)
    kept = ours.get_base_model_state_dict(found)
    assert all(torch.equal(kept[key], weight) for key, weight in weights.items())
    close(logits(found.merge_and_unload(adapter_names=names)), logits(expected.merge_and_unload(adapter_names=names)))


def test_unloading_leaves_the_plain_model(base: Any) -> None:
    model = pair(ours, base)
    keys = list(base.state_dict())
    plain = model.unload()
    assert list(plain.state_dict()) == keys
    assert torch.equal(logits(plain), logits(base))
    assert all(type(m) is type(n) for m, n in zip(plain.modules(), base.modules(), strict=True))


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.2, -0.5)])
def test_weighted_adapters(base: Any, kind: str, weights: tuple[float, float]) -> None:
    outputs = []
    for model in both(base):
        density = None if kind in ("cat", "svd", "linear") else 0.5
        model.add_weighted_adapter(["default", "other"], list(weights), "mixed", combination_type=kind, density=density)
        model.set_adapter("mixed")
        outputs.append(logits(model))
    close(outputs[1], outputs[0])
    assert (outputs[1] - logits(base)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_with_everything_kept_is_what_it_prunes(base: Any, kind: str) -> None:
    outputs = []
    for name in (kind, kind.replace("dare_", "").replace("linear_svd", "svd")):
        model = pair(ours, base)
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mixed", combination_type=name, density=1.0)
        model.set_adapter("mixed")
        outputs.append(logits(model))
    close(outputs[0], outputs[1])


def test_operators_give_the_golden_numbers() -> None:
    case = GOLDEN["task_merge"]
    tensors = [torch.tensor(case["t1"], dtype=torch.float64), torch.tensor(case["t2"], dtype=torch.float64)]
    expected = {
        ("magnitude_prune", 0.5, "total"): "magnitude_prune",
        ("ties", 0.5, "total"): "ties_total",
        ("ties", 0.5, "frequency"): "ties_frequency",
        ("ties", 1.0, "total"): "ties_density_1",
        ("linear", None, "total"): "task_arithmetic",
    }
    for (kind, density, sign), name in expected.items():
        found = combine(kind, tensors, case["weights"], density=density, sign=sign)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found, torch.tensor(case[name], dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_best_low_rank_pair_of_a_low_rank_update_is_exact(seed: int) -> None:
    delta = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64)
    for rank in (2, 7):
        a, b = low_rank_of(delta, rank)
        assert (a.shape, b.shape) == ((rank, 9), (5, rank))
        torch.testing.assert_close(b @ a, delta)


def test_a_mixed_batch_gives_each_row_its_adapter(base: Any) -> None:
    names = ["__base__", "other", "default", "other"]
    expected, found = both(base)
    mixed = logits(found, adapter_names=names)
    close(mixed, logits(expected, adapter_names=names))
    found.set_adapter("other")
    torch.testing.assert_close(mixed[[1, 3]], logits(found)[[1, 3]], atol=1e-6, rtol=1e-6)
    generated = found.generate(input_ids=tokens(), adapter_names=names, max_new_tokens=5, num_beams=2, do_sample=False)
    assert torch.equal(generated[0, :12], base.generate(input_ids=tokens(), max_new_tokens=5, num_beams=2, do_sample=False)[0, :12])
    with pytest.raises(AdapterError, match="Length of `adapter_names`"):
        logits(found, adapter_names=names[:3])
    with pytest.raises(AdapterError, match="non-existing adapter"):
        logits(found, adapter_names=["nobody"] * 4)


def test_loraplus_groups_are_pefts(base: Any) -> None:
    from peft.optimizers import create_loraplus_optimizer

    options: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    expected, found = both(base)
    theirs_by_size = sorted(
        (g["lr"], g["weight_decay"], p.numel())
        for g in create_loraplus_optimizer(expected, torch.optim.AdamW, **options).param_groups
        for p in g["params"]
    )
    made = ours.create_loraplus_optimizer(found, torch.optim.AdamW, **options)
    assert sorted((g["lr"], g["weight_decay"], p.numel()) for g in made.param_groups for p in g["params"]) == theirs_by_size


def test_layer_attributes_are_views(base: Any) -> None:
    expected, found = both(base)
    layers = [m.base_model.model.model.layers[1].mlp.down_proj for m in (expected, found)]
    for layer in layers:
        layer.set_scale("default", 3)
    for own in ("scaling", "r", "lora_alpha"):
        assert dict(getattr(layers[1], own)) == dict(getattr(layers[0], own))
    assert torch.equal(layers[1].lora_A["other"].weight, layers[0].lora_A["other"].weight)
    assert torch.equal(layers[1].lora_B.default.weight, layers[0].lora_B.default.weight)
    assert torch.equal(layers[1].base_layer.weight, layers[0].base_layer.weight)
    close(layers[1].get_delta_weight("default"), layers[0].get_delta_weight("default"))
    assert type(layers[1].base_layer) is nn.Linear
    close(logits(found), logits(expected))
    x = torch.randn(2, layers[1].in_features)
    close(layers[1].base_layer(x), layers[0].base_layer(x))


def test_injecting_gives_the_same_model(base: Any) -> None:
    outputs = []
    for library in (theirs, ours):
        model = copy.deepcopy(base)
        config = library.LoraConfig(r=4, target_modules=["q_proj"])
        assert library.inject_adapter_in_model(config, model) is model
        state = library.get_peft_model_state_dict(model)
        draw = torch.Generator().manual_seed(2)
        filled = {key.removeprefix("base_model.model."): torch.randn(state[key].shape, generator=draw) for key in sorted(state)}
        prefix = "base_model.model." if library is ours else ""
        library.set_peft_model_state_dict(model, {prefix + key: value for key, value in filled.items()})
        outputs.append(logits(model))
    close(outputs[1], outputs[0])


def test_a_pissa_file_of_peft_keeps_its_outputs(base: Any, tmp_path: Path) -> None:
    model = theirs.get_peft_model(
        copy.deepcopy(base), theirs.LoraConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    found = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)
    assert (logits(found) - logits(base)).abs().max() > 1e-3
    found.save_pretrained(tmp_path / "again")
    close(logits(theirs.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()), logits(found))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA"])
def test_every_start_that_peft_names_begins_at_the_bases_outputs(base: Any, start: str) -> None:
    model = ours.get_peft_model(copy.deepcopy(base), ours.LoraConfig(init_lora_weights=start, r=4, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(logits(model.eval()), logits(base), atol=1e-5, rtol=1e-5)
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_" in name)


def test_ia3_of_bert_by_default_is_written_so_that_it_is_found_again(tmp_path: Path) -> None:
    bare = tiny.build("bert").eval()
    model = ours.get_peft_model(copy.deepcopy(bare), ours.IA3Config(task_type="SEQ_CLS")).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.add_(3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(tmp_path)
    for library in (ours, theirs):
        close(logits(library.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()), logits(model))
    assert (logits(model) - logits(bare)).abs().max() > 1e-3


def test_adalora_has_pefts_loss_and_schedule(base: Any) -> None:
    """Six steps of a loop written for peft: losses with the penalty, and every tensor."""
    runs = []
    for library in (ours, theirs):
        options = {"target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6, "lora_dropout": 0.0}
        config = library.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
        model = library.get_peft_model(copy.deepcopy(base), config)
        draw = torch.Generator().manual_seed(4)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name in sorted(trained):
                trained[name].copy_(0.3 * torch.randn(trained[name].shape, generator=draw))
        optimizer = torch.optim.SGD(trained.values(), lr=0.5)
        losses = []
        for step in range(1, 7):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        runs.append((losses, {name: trained[name].detach() for name in sorted(trained)}))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name.endswith("Config")])
def test_configurations_have_pefts_fields_and_defaults(name: str) -> None:
    def known(library: ModuleType) -> dict[str, Any]:
        fields = [f for f in dataclasses.fields(getattr(library, name)) if f.name != "runtime_config"]  # an object of peft's own
        return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}

    assert known(ours) == known(theirs)


def test_forward_shows_the_models_columns_and_takes_them_by_position(base: Any) -> None:
    model = pair(ours, base)
    assert list(inspect.signature(model.forward).parameters) == ["input_ids", "attention_mask", "inputs_embeds", "labels", "kwargs"]
    with torch.no_grad():
        assert torch.equal(model(tokens(), None, labels=None).logits, logits(model))
    for arguments, options in (((tokens(), None, None, None, None), {}), ((tokens(),), {"input_ids": tokens()})):
        with pytest.raises(TypeError):
            model(*arguments, **options)


@pytest.mark.parametrize("build", [tiny.llama, tiny.bert, tiny.t5, tiny.gpt2, tiny.opt])
def test_peft_classes_hide_no_attribute_of_the_users_model(build: Any) -> None:
    model = build()
    known = set(dir(theirs.LoraModel)) | set(dir(theirs.PeftModel))
    added = {name for cls in (ours.PeftModel, Session) for name in dir(cls) if not name.startswith("_")} - known
    assert not added & {name for module in model.modules() for name in dir(module)}


def test_an_auto_class_loads_base_and_adapter(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    loaded = tiny.llama().from_pretrained(tmp_path / "base")
    pair(ours, loaded).save_pretrained(tmp_path / "adapter")
    expected = theirs.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    found = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    close(logits(found), logits(expected))
    with pytest.raises(AdapterError, match="SEQ_CLS"):
        ours.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_preparing_a_half_precision_model_freezes_it(base: Any) -> None:
    model = ours.prepare_model_for_int8_training(base)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_projj"]}, "not found in the base model"),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["nothing"]}, "not found in the base model"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_touched(base: Any, options: dict[str, Any], message: str) -> None:
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        ours.get_peft_model(base, ours.LoraConfig(**options))
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("name", ["LoraModel", "LoHaConfig", "LoraConfg", "get_peft_modl", "nothing_of_the_sort"])
def test_an_absent_name_is_an_attribute_error(name: str) -> None:
    assert not hasattr(ours, name)
    with pytest.raises(AttributeError, match=name):
        getattr(ours, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from byway.compat.peft import {name}", {})
    with pytest.raises(AttributeError, match="did you mean 'LoraConfig'"):
        ours.LoraConfg  # noqa: B018
