"""``add_weighted_adapter``: whatever an adapter consists of is combined, or refused by name before the model is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft as theirs
import pytest
import torch
from torch import Tensor

import byway.compat.peft as ours
from byway.errors import AdapterError
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LINEAR = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "DoRA on an embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "lora_bias": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "trained tokens": {"trainable_token_indices": [3, 5, 9]},
    "trained tokens by name": {"trainable_token_indices": {"embed_tokens": [5, 4]}},
    "a head": {"modules_to_save": ["lm_head"]},
    "everything": {"lora_bias": True, "trainable_token_indices": [3, 5], "modules_to_save": ["model.norm"], "use_rslora": True},
}
SUMMED = ("LoRA", "rsLoRA, patterns", "lora_bias", "PiSSA", "OLoRA")
"""Adapters that consist of additive updates: two at once are the sum of both."""


def tokens() -> Tensor:
    return torch.randint(3, 12, (4, 7), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def randomized(model: Any, names: Sequence[str] = ("default",)) -> Any:
    """Change every tensor of these adapters; the same in both libraries."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            model.set_adapter(name)
            for key, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
                start = parameter if "lora_A" not in key else 0  # drawn when attached
                parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=draw))
        model.set_adapter(names[0])
    return model.eval()


def config(**options: Any) -> ours.LoraConfig:
    return ours.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


BASES: dict[str, Callable[[], Any]] = {"tied head": tiny.llama, "own head": lambda: tiny.llama(tie_word_embeddings=False)}


@pytest.mark.covering_sample
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("kind", ["svd", "cat", "ties"])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_adapter_with_weight_1_is_the_same_adapter(name: str, kind: str, base: Callable[[], Any], tmp_path: Path, seed: int) -> None:
    bare = base().eval()
    model = randomized(ours.get_peft_model(copy.deepcopy(bare), config(**OPTIONS[name])))
    expected = logits(model)
    assert (expected - logits(bare)).abs().max() > 0.05
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type=kind, density=0.5)
    model.set_adapter("copy")
    close(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["copy"])
    for library in (ours, theirs):
        close(logits(library.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "copy").eval()), expected)


@pytest.mark.parametrize("kind", ["svd", "cat"])
@pytest.mark.parametrize("name", SUMMED)
def test_two_adapters_with_weight_1_are_both_at_once(name: str, kind: str, seed: int) -> None:
    other = {"rank_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "up_proj"]} | OPTIONS[name]
    model = ours.get_peft_model(tiny.llama().eval(), config(**OPTIONS[name]))
    model.add_adapter("other", config(**other | {"target_modules": ["q_proj", "up_proj"]}))
    randomized(model, ["default", "other"]).base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=kind, svd_rank=24)
    model.set_adapter("sum")
    close(logits(model), expected)


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_ranks_that_differ_give_pefts_numbers(kind: str, seed: int) -> None:
    base = tiny.llama().eval()
    outputs = []
    for library in (theirs, ours):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
        second = library.LoraConfig(r=8, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=LINEAR, task_type="CAUSAL_LM")
        model.add_adapter("other", second)
        randomized(model, ["default", "other"])
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mixed", combination_type=kind, svd_rank=5)
        model.set_adapter("mixed")
        outputs.append(logits(model))
        with pytest.raises(ValueError, match="All adapters must have the same r value"):
            model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "refused", combination_type="linear")
    close(outputs[1], outputs[0])
    assert "refused" not in model.peft_config


def test_trained_tokens_and_whole_modules_are_added_up_around_the_base(seed: int) -> None:
    base = tiny.llama(tie_word_embeddings=False).eval()
    first, second = {"trainable_token_indices": [3, 5], "modules_to_save": ["model.norm"]}, {"trainable_token_indices": [5, 9]}
    model = ours.get_peft_model(copy.deepcopy(base), config(**first))
    model.add_adapter("other", config(**second))
    randomized(model, ["default", "other"])
    model.add_weighted_adapter(["default", "other"], [0.6, -0.3], "sum", combination_type="cat")
    merged = {}
    for name in ("default", "other", "sum"):
        twin = copy.deepcopy(model)
        merged[name] = twin.merge_and_unload(adapter_names=[name]).model
    for tensor in ("embed_tokens.weight", "norm.weight", "layers.1.mlp.down_proj.weight"):
        here = base.model.get_parameter(tensor)
        change = {name: merged[name].get_parameter(tensor) - here for name in merged}
        close(change["sum"], 0.6 * change["default"] - 0.3 * change["other"])
        assert change["sum"].abs().max() > 0.01


def test_ia3_keeps_its_head_and_what_only_one_of_two_adapts(seed: int) -> None:
    model = ours.get_peft_model(tiny.build("bert").eval(), ours.IA3Config(task_type="SEQ_CLS"))
    expected = logits(randomized(model))
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    close(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "names", "weights", "kind", "message"),
    [
        ({"use_dora": True}, ["default", "other"], [0.5, 0.5], "cat", "magnitudes of DoRA"),
        ({"use_dora": True}, ["default"], [0.5], "linear", "magnitudes of DoRA"),
        ({"trainable_token_indices": [3]}, ["default", "other"], [0.5, 0.5], "ties", "trainable_token_indices"),
        ({"lora_bias": True}, ["default", "other"], [0.5, 0.5], "magnitude_prune_svd", "lora_bias"),
        ({}, ["default", "other"], [0.5, 0.5], "ties", "density"),
        ({}, ["default", "other"], [0.5, 0.5], "sum", "Invalid combination_type"),
        ({}, ["default"], [0.5, 0.5], "cat", "1 adapters and 2 weights"),
    ],
)
def test_what_has_no_weighted_sum_is_refused_and_leaves_the_model_alone(
    options: dict[str, Any], names: list[str], weights: list[float], kind: str, message: str
) -> None:
    model = ours.get_peft_model(tiny.llama().eval(), config(**options))
    model.add_adapter("other", config(**options))
    before = logits(randomized(model, ["default", "other"]))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(names, weights, "mixed", combination_type=kind)
    assert "mixed" not in model.peft_config
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


def test_a_trained_bias_is_refused_by_name(seed: int) -> None:
    model = ours.get_peft_model(tiny.opt().eval(), config(target_modules=["fc1"], bias="lora_only"))
    with pytest.raises(AdapterError, match="bias"):
        model.add_weighted_adapter(["default"], [1.0], "copy")
    assert list(model.peft_config) == ["default"]
