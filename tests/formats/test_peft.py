"""Adapters travel between Byway and HF peft: logits agree to 1e-5, in both directions, for every kind of site and option."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import byway

IDS = torch.tensor([[5, 9, 3, 60, 7, 3], [1, 2, 3, 4, 5, 6]])
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
OUTSIDE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(tied: bool = False, vocabulary: int = 64) -> nn.Module:
    torch.manual_seed(11)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=tied, **OUTSIDE)
    return LlamaForCausalLM(config).eval()


def tied_llama() -> nn.Module:
    return llama(tied=True)


def gpt2() -> nn.Module:
    torch.manual_seed(12)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, **OUTSIDE)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def bert() -> nn.Module:
    torch.manual_seed(13)
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=64, num_labels=3)).eval()


def roberta() -> nn.Module:
    torch.manual_seed(14)
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, vocab_size=64, num_labels=3, **OUTSIDE)).eval()


def vit() -> nn.Module:
    torch.manual_seed(15)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)).eval()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.conv(x)).mean((2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(16)
    return Convolutions().eval()


def answer(model: Any) -> Tensor:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    torch.manual_seed(17)
    with torch.no_grad():
        if isinstance(base, Convolutions):
            return model(torch.randn(2, 3, 8, 8))
        if isinstance(base, ViTForImageClassification):
            return model(pixel_values=torch.randn(2, 3, 16, 16)).logits
        return model(input_ids=IDS).logits


@dataclass
class Case:
    base: Callable[[], nn.Module]
    theirs: dict[str, Any]
    """Arguments of peft.LoraConfig."""
    ours: dict[str, Any] | None = None
    """The same as arguments of byway.LoRA; None where one of the two cannot say it."""
    warned: tuple[str, ...] = field(default=())


FULL_PATH = r"model\.layers\.1\.(self_attn|mlp)\.(q|up)_proj"
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"up_proj": 3}}
CASES = {
    "names": Case(llama, {"target_modules": ["q_proj", "v_proj"]}, {"targets": ["q_proj", "v_proj"]}),
    "regular expression": Case(llama, {"target_modules": FULL_PATH}, {"targets": FULL_PATH}),
    "all-linear": Case(llama, {"target_modules": "all-linear"}, {"targets": "all-linear"}),
    "rank and alpha patterns": Case(
        llama,
        {"target_modules": ["q_proj", "up_proj"], **PATTERNS},
        {"targets": ["q_proj", "up_proj"], **PATTERNS},
    ),
    "rank-stabilized": Case(llama, {"target_modules": ["q_proj"], "use_rslora": True}, {"targets": ["q_proj"], "rank_stabilized": True}),
    "some layers": Case(llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"targets": ["q_proj"], "layers": [1]}),
    "excluded": Case(
        llama, {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*0\.self_attn\.o_proj"},
        {"targets": ["q_proj", "o_proj"], "exclude": ["model.layers.0.self_attn.o_proj"]},
    ),
    "embedding": Case(llama, {"target_modules": ["embed_tokens", "q_proj"]}, {"targets": ["embed_tokens", "q_proj"]}, ("save_embedding",)),
    "tied embedding": Case(
        tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}, {"targets": ["embed_tokens", "q_proj"]}, ("save_embedding", "tie_word"),
    ),
    "output head": Case(llama, {"target_modules": ["lm_head", "q_proj"]}, {"targets": ["lm_head", "q_proj"]}, ("save_embedding",)),
    "modules to save": Case(
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "modules to save, tied": Case(
        tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, ("tie",),
    ),
    "tied modules saved together": Case(
        tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "trained tokens": Case(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, {"targets": ["q_proj"], "trained_tokens": [3, 5]},
    ),
    "trained tokens, tied": Case(
        tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, {"targets": ["q_proj"], "trained_tokens": [3, 5]},
    ),
    "GPT-2's Conv1D": Case(gpt2, {"target_modules": ["c_attn", "c_proj"]}, {"targets": ["c_attn", "c_proj"]}, ("fan_in_fan_out",)),
    "biases of targets": Case(
        gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}, {"targets": ["c_attn"], "bias": "lora_only"}, ("fan_in_fan_out", "bias"),
    ),
    "all biases": Case(
        bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}, {"targets": ["query"], "bias": "all"}, ("bias",),
    ),
    "a bias of its own": Case(
        gpt2, {"target_modules": ["c_attn"], "lora_bias": True}, {"targets": ["c_attn"], "lora_bias": True}, ("fan_in_fan_out",),
    ),
    "a classifier": Case(bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, {"targets": ["query"]}),
    "a classifier of several layers": Case(roberta, {"target_modules": ["query"], "task_type": "SEQ_CLS"}, {"targets": ["query"]}),
    "ViT": Case(vit, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}, {"targets": ["q_proj", "v_proj"]}),
    "convolutions": Case(
        convolutions, {"target_modules": ["conv", "inner.0", "fc"]}, {"targets": ["conv", "inner.0", "fc"]},
    ),
}  # fmt: skip


def shake(parameters: Any) -> None:
    """Give every trained tensor values that matter."""
    torch.manual_seed(99)
    for parameter in parameters:
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def by_peft(case: Case, folder: Path) -> Tensor:
    """Make an adapter with peft, save it, return what the adapted model answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.base(), peft.LoraConfig(r=4, lora_alpha=6, **case.theirs)).eval()
        shake(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(folder)
    return answer(model)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_peft_writes_is_loaded(case, tmp_path):
    expected = by_peft(case, tmp_path)
    model = case.base()
    bare = answer(model)
    byway.load(model, tmp_path)
    got = answer(model)
    assert (got - expected).abs().max() <= 1e-5
    assert (got - bare).abs().max() > 1e-2
    with byway.disabled(model):
        assert torch.equal(answer(model), bare)


def by_byway(case: Case, folder: Path) -> Tensor:
    model = case.base()
    assert case.ours is not None
    adapter = byway.attach(model, byway.LoRA(rank=4, alpha=6, **case.ours))
    shake(p for _, p in adapter.named_parameters())
    adapter.save(folder)
    return answer(model)


BOTH = {name: case for name, case in CASES.items() if case.ours is not None}


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH.keys())
def test_what_byway_writes_peft_loads_without_a_warning(case, tmp_path):
    expected = by_byway(case, tmp_path)
    model = case.base()
    bare = answer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
    said = [str(w.message) for w in caught if not any(word in str(w.message) for word in (*case.warned, "is_gradient_checkpointing"))]
    assert not said
    got = answer(loaded)
    assert (got - expected).abs().max() <= 1e-5
    assert (got - bare).abs().max() > 1e-2


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH.keys())
def test_saving_loading_and_saving_again_changes_no_bit(case, tmp_path):
    expected = by_byway(case, tmp_path / "first")
    model = case.base()
    adapter = byway.load(model, tmp_path / "first", trainable=True)
    assert torch.equal(answer(model), expected)
    assert all(p.requires_grad for _, p in adapter.named_parameters())
    adapter.save(tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_written_configuration_has_only_fields_that_peft_knows(tmp_path):
    by_byway(CASES["names"], tmp_path)
    known = peft.LoraConfig().to_dict().keys()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= known
    assert (tmp_path / "adapter_config.json").read_text() == json.dumps(config, indent=2, sort_keys=True) + "\n"


def test_keys_are_those_of_peft_and_carry_no_adapter_name(tmp_path):
    model = llama()
    byway.attach(model, byway.LoRA(rank=4, targets=["q_proj"]), name="train").save(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{f}.weight" for i in (0, 1) for f in "AB"
    }


def test_pissa_is_written_as_an_ordinary_lora_of_twice_the_rank(tmp_path):
    model = llama()
    adapter = byway.attach(model, byway.LoRA(rank=3, alpha=6, init="pissa", targets=["q_proj"], rank_stabilized=True))
    shake(p for _, p in adapter.named_parameters())
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert (answer(theirs) - answer(model)).abs().max() <= 1e-5
    again = llama()
    byway.load(again, tmp_path)
    assert (answer(again) - answer(model)).abs().max() <= 1e-5


def test_enabled_blocks_of_a_fused_map_are_written_as_a_plain_lora(tmp_path):
    model = gpt2()
    adapter = byway.attach(model, byway.LoRA(rank=3, alpha=6, targets=["c_attn"], blocks=[True, False, True]))
    shake(p for _, p in adapter.named_parameters())
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
    assert (answer(theirs) - answer(model)).abs().max() <= 1e-5


def test_vit_adapters_named_as_before_transformers_5_are_loaded(tmp_path):
    from safetensors.torch import save_file

    expected = by_peft(CASES["ViT"], tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    old = {}
    for key, tensor in load_file(weights).items():
        key = key.replace("vit.layers.", "vit.encoder.layer.")
        old[key.replace("attention.q_proj", "attention.attention.query").replace("attention.v_proj", "attention.attention.value")] = tensor
    assert any("encoder.layer.0.attention.attention.query.lora_A" in key for key in old)
    save_file(old, weights, {"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = vit()
    byway.load(model, tmp_path)
    assert (answer(model) - expected).abs().max() <= 1e-5


def test_a_vocabulary_resized_before_training_comes_with_the_file(tmp_path):
    def resized(seed: int) -> nn.Module:
        model = tied_llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(67, mean_resizing=False)  # pyright: ignore
        return model

    ids = torch.tensor([[5, 64, 65, 66, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(resized(1), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])).eval()
        shake(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(tmp_path)
    model = resized(2)
    bare = model(ids).logits
    adapter = byway.load(model, tmp_path, trainable=True)
    assert any("resized vocabulary" in note for note in adapter.notes)
    assert (model(ids).logits - theirs(ids).logits).abs().max() <= 1e-5
    assert not any(p.numel() == 67 * 32 for _, p in adapter.named_parameters()), "the replaced weight is not trained"
    with byway.disabled(model):
        assert torch.equal(model(ids).logits, bare)
    adapter.save(tmp_path / "again")
    third = resized(3)
    byway.load(third, tmp_path / "again")
    assert torch.equal(third(ids).logits, model(ids).logits)
    byway.detach(model)
    assert torch.equal(model(ids).logits, bare)
    with pytest.raises(byway.AdapterError, match=r"\[67, 32\].*\[64, 32\]"):
        byway.load(tied_llama(), tmp_path)
