"""Models with dense layers beside experts: HF peft takes some of their maps for experts, so no such file is written for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import byway
from byway.core.families.names import _EXPERTS
from tests import zoo

_MLA: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, 
    "intermediate_size": 48, "max_position_embeddings": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
_DENSE_FIRST: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", {**_TEXT, **_MLA, **_DENSE_FIRST}),
    "deepseek_v3": ("DeepseekV3", {**_TEXT, **_MLA, **_DENSE_FIRST}),
    "glm4_moe": ("Glm4Moe", {**_TEXT, **_DENSE_FIRST, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**_TEXT, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0]}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_TEXT, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0], "layer_types": ["full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "laguna": ("Laguna", {**_TEXT, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16}),
    "qwen2_moe": ("Qwen2Moe", {**_TEXT, "num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16}),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "lora": lambda targets: byway.LoRA(rank=2, targets=targets, modules_to_save="none"),
    "rslora": lambda targets: byway.LoRA(rank=2, targets=targets, rank_stabilized=True, modules_to_save="none"),
    "dora": lambda targets: byway.DoRA(rank=2, targets=targets, modules_to_save="none"),
    "adalora": lambda targets: byway.AdaLoRA(targets=targets, modules_to_save="none"),
    "ia3": lambda targets: byway.IA3(modules_to_save="none"),
}
IDS = torch.tensor([[5, 9, 3, 60, 7, 3], [1, 2, 3, 4, 5, 6]])
TAKEN = {"deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe", "qwen3_next", "laguna"}


def base(family: str) -> nn.Module:
    stem, values = CONFIGS[family]
    torch.manual_seed(3)
    return getattr(transformers, f"{stem}ForCausalLM")(getattr(transformers, f"{stem}Config")(**values)).eval()


def answer(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def adapted(family: str, method: byway.Method) -> tuple[nn.Module, byway.Adapter]:
    model = base(family)
    adapter = byway.attach(model, method)
    torch.manual_seed(4)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, adapter


def gradients(model: nn.Module, infix: str, prefix: str) -> dict[str, torch.Tensor]:
    answer(model).double().square().mean().backward()
    named = {name.removeprefix(prefix).replace(infix, ".").removesuffix(".weight"): p.grad for name, p in model.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_for_peft_is_what_peft_computes(family: str, method: str, tmp_path: Path) -> None:
    model, adapter = adapted(family, METHODS[method]("all-linear"))
    expected = answer(model).detach()
    adapter.save(tmp_path / "a")
    if (tmp_path / "a" / "byway_adapter.json").exists():
        assert family in TAKEN and method not in ("adalora", "ia3"), adapter.notes
        assert any("saved in Byway's own format: HF peft takes" in note and "mlp" in note for note in adapter.notes)
        assert "HF peft takes" in (tmp_path / "a" / "README.md").read_text()
        found = base(family)
        byway.load(found, tmp_path / "a")
    else:
        assert family not in TAKEN or method in ("adalora", "ia3")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = peft.PeftModel.from_pretrained(base(family), str(tmp_path / "a")).eval()
    assert (answer(found) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_without_the_maps_that_are_taken_for_experts_peft_has_the_same_outputs_and_gradients(family: str, tmp_path: Path) -> None:
    model, adapter = adapted(family, METHODS["lora"]("attention"))
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base(family), str(tmp_path / "a"), is_trainable=True).eval()
    assert (answer(theirs) - answer(model)).abs().max() < 1e-5
    own, other = gradients(model, ".byway.default.", ""), gradients(theirs, "_.default.", "base_model.model.")
    other = {name.replace(".default", ""): grad for name, grad in other.items()}
    assert own.keys() == other.keys() and own
    for name, grad in own.items():
        assert (grad - other[name]).abs().max() <= 1e-5 * grad.abs().max(), name


def test_a_file_that_peft_would_read_differently_is_noted_on_loading(tmp_path: Path) -> None:
    """An older peft wrote dense layers under their names; so did earlier versions of this package."""
    _, adapter = adapted("qwen2_moe", METHODS["lora"](["model.layers.0.mlp.gate_proj"]))
    adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").exists()
    config, stem = CONFIGS["qwen3_moe"][1], transformers.Qwen3MoeForCausalLM
    notes = byway.load(stem(transformers.Qwen3MoeConfig(**config)), tmp_path / "a", check_base=False).notes
    assert any("HF peft computes something else" in note for note in notes)


def test_the_table_is_that_of_peft() -> None:
    patterns, names = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    theirs = {kind: tuple(names[pattern]) for kind, pattern in patterns.items() if pattern in names and kind in CONFIG_MAPPING}
    ours = {kind: leaves for leaves, kinds in _EXPERTS.items() for kind in kinds}
    assert {kind: set(leaves) for kind, leaves in ours.items()} == {kind: set(leaves) for kind, leaves in theirs.items()}


@pytest.mark.parametrize("family", ["llama", "vit", "gpt2", "bert", "clip"])
def test_other_models_keep_peft_s_format(family: str) -> None:
    assert not any("own format" in note for note in byway.attach(zoo.build(family), byway.LoRA(rank=2)).notes)
