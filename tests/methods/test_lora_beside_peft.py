"""LoRA beside HF peft: the same tensors give the same outputs and the same gradients."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import byway
from byway.methods.lora import LoRA
from byway.methods.lowrank.sides import LowRank
from tests.methods.lora_sides import relative
from tests.tiny import build, inputs, randomize

# ---- HF peft: the same tensors give the same outputs and the same gradients


PEFT_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "names": ("llama", {"targets": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "regex": ("llama", {"targets": r".*layers\.[01]\..*_proj"}, {"target_modules": r".*layers\.[01]\..*_proj"}),
    "all linear": ("qwen2", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "default": ("opt", {}, {}),
    "embedding and head": ("qwen2", {"targets": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "Conv1D": ("gpt2", {"targets": ["c_attn", "c_fc"]}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "patterns": (
        "llama",
        {"targets": ["q_proj", "v_proj"], "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ),
    "rank stabilized": ("llama", {"targets": ["v_proj"], "rank_stabilized": True}, {"target_modules": ["v_proj"], "use_rslora": True}),
    "lora bias": (
        "bert",
        {"targets": ["query", "value"], "lora_bias": True, "modules_to_save": "none"},
        {"target_modules": ["query", "value"], "lora_bias": True},
    ),
    "layers": ("llama", {"targets": ["q_proj"], "layers": [0, 2]}, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "encoder-decoder": ("t5", {"targets": ["q", "v"]}, {"target_modules": ["q", "v"]}),
    "classifier": ("roberta", {}, {"task_type": "SEQ_CLS"}),
    "patch convolution": (
        "vit",
        {"targets": ["projection", "q_proj"], "modules_to_save": "none"},
        {"target_modules": ["projection", "q_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", PEFT_CASES)
def test_equals_peft_in_outputs_and_gradients(which: str) -> None:
    family, ours_options, peft_options = PEFT_CASES[which]
    ours, bare, x = build(family), build(family), inputs(family)
    adapter = byway.attach(ours, LoRA(rank=3, alpha=7, **ours_options))
    theirs = peft.get_peft_model(bare, peft.LoraConfig(r=3, lora_alpha=7, **peft_options)).eval()
    matched = _same_numbers(adapter, theirs)
    y, expected = ours(**x).logits, theirs(**x).logits
    assert relative(y.detach(), expected.detach()) < 1e-6
    with byway.disabled(ours):
        assert relative(ours(**x).logits, expected.detach()) > 1e-4
    y.pow(2).mean().backward()
    expected.pow(2).mean().backward()
    for mine, other in matched:
        assert mine.grad is not None and other.grad is not None
        assert float((mine.grad - other.grad).norm()) <= 1e-5 * float(other.grad.norm()) + 1e-9
    assert adapter.num_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def _same_numbers(adapter: byway.Adapter, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Fill both with the same numbers, tensor by tensor; every trained tensor of peft's must have its counterpart."""
    peft_own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for site, side in adapter.side_paths():
        own = dict(side.named_parameters())
        names = side.peft_names or {f"copy.{k}": k for k in dict(side.named_modules())["copy"].state_dict()}
        for ours_name, suffix in names.items():
            if ours_name not in own:
                continue
            leaf, _, rest = suffix.partition(".")
            candidates = [f"base_model.model.{site.path}.{leaf}.default{'.' + rest if rest else ''}"]
            candidates.append(f"base_model.model.{site.path}.modules_to_save.default.{suffix}")
            (found,) = [c for c in candidates if c in peft_own]
            pairs.append((own[ours_name], peft_own.pop(found)))
    assert not peft_own
    g = torch.Generator().manual_seed(11)
    for mine, other in pairs:
        values = 0.1 * torch.randn(mine.shape, generator=g)
        mine.data.copy_(values)
        other.data.copy_(values.reshape(other.shape))
    return pairs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_trained_biases_equal_pefts_and_the_base_keeps_its_own(mode: Any) -> None:
    ours, bare, x = build("gpt2"), build("gpt2"), inputs("gpt2")
    adapter = byway.attach(ours, LoRA(rank=2, targets=["c_attn"], bias=mode))
    theirs = peft.get_peft_model(
        bare, peft.LoraConfig(r=2, lora_alpha=16, target_modules=["c_attn"], bias=mode, fan_in_fan_out=True)
    ).eval()
    expected_names = {
        n.replace("base_model.model.", "").replace("base_layer.", "")
        for n, p in theirs.named_parameters()
        if p.requires_grad and n.endswith("bias")
    }
    found = {f"{site.path}.bias": side for site, side in adapter.side_paths() if not isinstance(side, LowRank)}
    assert set(found) == expected_names
    randomize([(n, p) for n, p in adapter.named_parameters() if "lora_" in n], scale=0.3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            path, _, factor = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
            parameter.data.copy_(dict(adapter.named_parameters())[f"{path}.byway.default.{factor}"])
    frozen = {k: v.clone() for k, v in byway.base_state_dict(ours).items()}
    g = torch.Generator().manual_seed(4)
    for path, side in found.items():
        values = torch.randn(dict(side.named_parameters())["bias"].shape, generator=g)
        dict(side.named_parameters())["bias"].data.copy_(values)
        for name, parameter in theirs.named_parameters():
            if name.replace("base_model.model.", "").replace("base_layer.", "") == path:
                parameter.data.copy_(values)
    assert relative(ours(**x).logits.detach(), theirs(**x).logits.detach()) < 1e-5
    assert all(torch.equal(v, frozen[k]) for k, v in byway.base_state_dict(ours).items())
    unmerged = ours(**x).logits.detach()
    byway.merge(ours)
    assert relative(ours(**x).logits.detach(), unmerged) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_equal_pefts_tied_or_not(tied: bool) -> None:
    from tests.tiny import llama

    torch.manual_seed(0)
    ours = llama(tie_word_embeddings=tied).eval()
    torch.manual_seed(0)
    bare = llama(tie_word_embeddings=tied).eval()
    adapter = byway.attach(ours, LoRA(rank=2, targets=["q_proj"], trained_tokens=(5, 9)))
    theirs = peft.get_peft_model(
        bare, peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    ).eval()
    rows = torch.randn(2, 32)
    (mine,) = [p for n, p in adapter.named_parameters() if n.endswith(".rows")]
    mine.data.copy_(rows)
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(rows)
    x = {"input_ids": torch.tensor([[3, 5, 9, 4]])}
    assert relative(ours(**x).logits.detach(), theirs(**x).logits.detach()) < 1e-6
    unmerged = ours(**x).logits.detach()
    byway.merge(ours)
    assert relative(ours(**x).logits.detach(), unmerged) < 1e-6
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.filterwarnings("ignore")
def test_lora_plus_groups_give_b_the_faster_rate_as_pefts_optimizer_does() -> None:
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = build("llama"), peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter = byway.attach(ours, LoRA(rank=2, targets=["q_proj"], plus_ratio=16.0))
    groups = adapter.method.param_groups(adapter, 1e-3)
    names = {id(p): n for n, p in adapter.named_parameters()}
    rates = {names[id(p)].rpartition(".")[2]: g["lr"] for g in groups for p in g["params"]}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    by_id = {id(p): n for n, p in theirs.named_parameters()}
    expected = {by_id[id(p)].split(".")[-3]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates == expected == {"lora_A": 1e-3, "lora_B": 16e-3}
