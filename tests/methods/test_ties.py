"""Tensors that several modules share (biases, embeddings, heads, layers): trained once, and alike in every place that reads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import byway
from byway import AdaLoRA, BitFit, DoRA, Full, LoRA
from byway.core.merge import merge
from byway.methods.ia3 import IA3
from byway.workshop.merge.files import merge_files
from tests import zoo
from tests.tiny import randomize

MASKED = ("bert", "roberta", "albert", "camembert", "mpnet")
"""Families whose masked language model adds one bias under two names."""
HEADS = {"bert": "cls", "roberta": "lm_head", "albert": "predictions", "camembert": "lm_head"}


def build(family: str) -> Any:
    model = zoo.build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def step(model: nn.Module, x: dict[str, Any], parameters: Any, rate: float = 0.5) -> Tensor:
    """One step of gradient descent, then the logits."""
    optimizer = torch.optim.SGD(list(parameters), lr=rate)
    model(**x).logits.float().pow(2).mean().backward()
    optimizer.step()
    with torch.no_grad():
        return model(**x).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["all", "lora_only"])
@pytest.mark.parametrize("family", MASKED)
def test_trained_biases_with_a_tie_are_pefts(family: str, mode: Any, tmp_path: Path) -> None:
    base = build(family)
    x = zoo.inputs(base)
    names = [path for path, module in base.named_modules() if isinstance(module, nn.Linear) and path.endswith(("query", ".q", "decoder"))]
    ours = copy.deepcopy(base)
    adapter = byway.attach(ours, LoRA(rank=2, targets=names, bias=mode, modules_to_save="none"))
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=names, bias=mode)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert adapter.num_parameters == sum(p.numel() for p in trained)
    adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert adapter.num_parameters == sum(p.numel() for p in trained)
    bare = base(**x).logits.detach()
    expected = step(theirs, x, trained)
    moved = step(ours, x, (p for _, p in adapter.named_parameters()))
    assert (moved - bare).abs().max() > 1e-3
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    # both files, in both programs
    adapter.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for directory in ("ours", "theirs"):
        again = copy.deepcopy(base)
        byway.load(again, tmp_path / directory)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / directory)
        for model in (again, other):
            torch.testing.assert_close(model(**x).logits, moved, rtol=1e-5, atol=1e-6)
    merge(ours)
    torch.testing.assert_close(ours(**x).logits, moved, rtol=1e-5, atol=1e-6)


class Siblings(nn.Module):
    """Two maps with one bias, a norm in two places, and a container that holds the bias as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.holder = nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()
        self.norm, self.second = nn.LayerNorm(6), nn.LayerNorm(6)
        self.two.bias = self.holder.bias = self.one.bias
        self.second.weight, self.second.bias = self.norm.weight, self.norm.bias
        self.alias = self.one
        with torch.no_grad():
            self.one.bias.normal_()
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Any:
        x = self.alias(self.second(self.two(self.norm(self.one(x))).tanh()).tanh())
        x = self.holder(x)
        return type("Output", (), {"logits": x.tanh()})()


SHARING = {
    "lora, all biases": (LoRA(rank=2, targets=["one"], bias="all"), lambda n: n.endswith("bias")),
    "lora, biases of the adapted": (LoRA(rank=2, targets=["one"], bias="lora_only"), lambda n: n in ("one.bias",)),
    "adalora": (AdaLoRA(targets=["two"], rank=1, initial_rank=2, bias="lora_only"), lambda n: n in ("one.bias",)),
    "dora": (DoRA(rank=2, targets=["two"], bias="lora_only"), lambda n: n in ("one.bias",)),
    "bitfit": (BitFit(), lambda n: n.endswith("bias")),
    "bitfit by name": (BitFit(which=["two"]), lambda n: n in ("one.bias",)),
    "full": (Full(), lambda n: True),
    "norms": (byway.LayerNormTuning(), lambda n: n.startswith("norm")),
}


@pytest.mark.parametrize("which", SHARING)
def test_a_shared_tensor_gets_the_step_that_torch_gives_it(which: str, seed: int) -> None:
    method, trains = SHARING[which]
    torch.manual_seed(seed)
    base = Siblings()
    x = {"x": torch.randn(4, 6)}
    ours, twin = copy.deepcopy(base), copy.deepcopy(base)
    adapter = byway.attach(ours, method)
    # LoRA's own tensors are left at their start, where they change nothing
    own = [p for n, p in adapter.named_parameters() if "lora_" not in n and "magnitude" not in n]
    wanted = [p for n, p in twin.named_parameters() if trains(n)]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in wanted)
    expected, moved = step(twin, x, wanted), step(ours, x, own)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    assert (moved - base(**x).logits).abs().max() > 1e-4
    merge(ours)
    torch.testing.assert_close(ours(**x).logits, moved, rtol=1e-5, atol=1e-6)


def test_a_change_of_one_of_two_tied_tensors_leaves_the_other(seed: int) -> None:
    torch.manual_seed(seed)
    for method in (LoRA(rank=2, targets=["one"], lora_bias=True), IA3(targets=["one"], feed_forward=["two"])):
        model = Siblings()
        x = torch.randn(4, 6)
        randomize(byway.attach(model, method).named_parameters(), scale=0.5)
        expected = model(x).logits
        assert any("has its own weight" in note or "has its own" in note for note in merge(model).notes)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-6)
        assert model.one.bias is not model.two.bias


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "t5", "llama", "opt"])
@pytest.mark.parametrize("how", ["copy of the head", "decoder", "bias of the decoder", "lora bias", "bitfit", "full", "tokens"])
def test_merged_in_memory_in_files_and_reloaded_it_is_the_adapted_model(how: str, family: str, tmp_path: Path, seed: int) -> None:
    base = build(family)
    x, head = zoo.inputs(base), next(p for p, m in base.named_modules() if m is base.get_output_embeddings())
    methods = {
        "copy of the head": LoRA(rank=2, modules_to_save=[HEADS.get(family, head)]),
        "decoder": LoRA(rank=2, targets=[head], modules_to_save="none"),
        "bias of the decoder": LoRA(rank=2, targets=[head], modules_to_save="none", bias="lora_only"),
        "lora bias": LoRA(rank=2, targets=[head], modules_to_save="none", lora_bias=True),
        "bitfit": BitFit(),
        "full": Full(),
        "tokens": LoRA(rank=2, trained_tokens=[3, 5]),
    }
    if how in ("bitfit", "lora bias") and family in ("t5", "llama", "opt") and not (how == "bitfit" and family == "opt"):
        pytest.skip("these models have no biases to merge into")
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base").eval()
    adapter = byway.attach(model, methods[how])
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        expected = model(**x).logits
        adapter.save(tmp_path / "adapter")
        again = type(base).from_pretrained(tmp_path / "base").eval()
        byway.load(again, tmp_path / "adapter")
        torch.testing.assert_close(again(**x).logits, expected, rtol=1e-5, atol=1e-5)
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files", samples=2)
        from_files = type(base).from_pretrained(tmp_path / "files").eval()
        torch.testing.assert_close(from_files(**x).logits, expected, rtol=1e-4, atol=1e-4)
        merge(model)
        torch.testing.assert_close(model(**x).logits, expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "memory")
        reloaded = type(base).from_pretrained(tmp_path / "memory").eval()
        torch.testing.assert_close(reloaded(**x).logits, expected, rtol=1e-4, atol=1e-5)
