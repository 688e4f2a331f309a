"""BitFit, layer-norm tuning and full fine-tuning: the base's own tensors trained beside it, against peft, torch and published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import byway
from byway import BitFit, Full, LayerNormTuning
from tests.tiny import build, inputs, randomize

BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def meta(kind: str, **sizes: int) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


@pytest.mark.parametrize(
    ("kind", "sizes", "which", "expected"),
    [
        ("Bert", {}, "all", 102_912),
        ("Bert", {}, "query_and_intermediate", 46_080),
        ("Bert", BERT_LARGE, "all", 272_384),
        ("Roberta", {}, "all", 102_912),
    ],
)
def test_bitfit_trains_as_many_numbers_as_the_paper_says(kind: str, sizes: dict[str, int], which: str, expected: int) -> None:
    assert byway.attach(meta(kind, **sizes), BitFit(which=which)).num_parameters == expected


def test_bitfit_moves_the_output_as_training_the_biases_themselves_would(seed: int) -> None:
    model, twin, x = build("bert"), build("bert"), inputs("bert")
    adapter = byway.attach(model, BitFit(modules_to_save="none"))
    assert adapter.num_parameters == sum(p.numel() for n, p in twin.named_parameters() if n.endswith("bias") and "classifier" not in n) + 3
    randomize(adapter.named_parameters())
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            own[f"{name.partition('.byway.')[0]}.bias"].copy_(p)
    out, expected = model(**x).logits, twin(**x).logits
    assert (out - expected).abs().max() < 1e-6
    out.pow(2).mean().backward()
    expected.pow(2).mean().backward()
    for name, p in adapter.named_parameters():
        reference = own[f"{name.partition('.byway.')[0]}.bias"].grad
        assert p.grad is not None and reference is not None
        assert (p.grad - reference).norm() <= 1e-5 * reference.norm() + 1e-9, name


def test_of_a_fused_map_the_reduced_variant_trains_the_queries() -> None:
    model = build("gpt2")
    adapter = byway.attach(model, BitFit(which="query_and_intermediate"))
    assert adapter.num_parameters == 3 * (32 + 128)
    randomize(adapter.named_parameters())
    c_attn, x = model.transformer.h[0].attn.c_attn, torch.randn(2, 32)
    out = c_attn(x)
    with byway.disabled(model):
        plain = c_attn(x)
    assert torch.equal(out[:, 32:], plain[:, 32:])
    assert not torch.equal(out[:, :32], plain[:, :32])
    before = model(**inputs("gpt2")).logits
    byway.merge(model)
    assert (model(**inputs("gpt2")).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_without_biases_gets_zero_ones_and_says_so_or_is_refused(family: str) -> None:
    model = build(family)
    adapter = byway.attach(model, BitFit())
    assert "no bias" in adapter.notes[-1]
    assert all(not p.any() for _, p in adapter.named_parameters())
    randomize(adapter.named_parameters())
    with pytest.raises(byway.NotMergeable, match="has no bias"):
        byway.merge(model)
    with pytest.raises(byway.TargetError, match="no bias to train"):
        byway.attach(build(family), BitFit(missing="refuse"))


def test_bitfit_in_batch_norms_and_attention_that_reads_its_parts(seed: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)).eval()
    adapter = byway.attach(model, BitFit())
    randomize(adapter.named_parameters())
    x = torch.randn(2, 3, 6, 6)
    out = model(x)
    byway.merge(model)
    assert torch.allclose(model(x), out, atol=1e-5)
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    notes = byway.attach(attention, BitFit()).notes
    assert any("in_proj_bias" in note for note in notes)
    attention(torch.randn(1, 3, 8))


@pytest.mark.parametrize(
    ("method", "options", "error", "says"),
    [
        (BitFit, {"which": ()}, byway.ConfigError, "which"),
        (BitFit, {"missing": "ad"}, byway.ConfigError, "missing"),
        (BitFit, {"which": ["c_att"]}, byway.TargetError, "did you mean 'c_attn'"),
        (LayerNormTuning, {"targets": []}, byway.ConfigError, r"targets is \[\]; it must be a non-empty"),
        (LayerNormTuning, {"targets": ["c_attn"]}, byway.TargetError, "does not support it"),
        (Full, {"targets": []}, byway.ConfigError, r"targets is \[\]; it must be a non-empty"),
        (Full, {"targets": ["act"]}, byway.TargetError, "does not support it"),
        (Full, {"layers": 9}, byway.TargetError, "9"),
    ],
)
def test_what_is_wrong_is_named(method: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = build("gpt2")
    with pytest.raises(error, match=says):
        byway.attach(model, method(**options))
    assert byway.adapters(model) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_norm_files_go_both_ways_with_peft(family: str, tmp_path: Path) -> None:
    x = inputs(family)
    model = build(family)
    adapter = byway.attach(model, LayerNormTuning())
    randomize(adapter.named_parameters())
    adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours"), is_trainable=True).eval()
    expected = theirs(**x).logits
    assert (expected - model(**x).logits).abs().max() <= 1e-5
    expected.pow(2).mean().backward()
    model(**x).logits.pow(2).mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if "ln_tuning_layers" in n}
    for name, p in adapter.named_parameters():
        path, _, own = name.partition(".byway.default.copy.")
        if f"base_model.model.{path}.ln_tuning_layers.default.{own}" in gradients:
            reference = gradients[f"base_model.model.{path}.ln_tuning_layers.default.{own}"]
            assert p.grad is not None and reference is not None and (p.grad - reference).norm() <= 1e-5 * reference.norm()
    targets = None if family in ("llama", "gpt2", "t5") else ["LayerNorm"]
    wrapped = peft.get_peft_model(build(family), peft.LNTuningConfig(target_modules=targets))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "ln_tuning_layers" in name:
                p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(tmp_path / "theirs")
    loaded = build(family)
    byway.load(loaded, tmp_path / "theirs")
    assert (loaded(**x).logits - wrapped.eval()(**x).logits).abs().max() <= 1e-5


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    for method in (LayerNormTuning(), BitFit()):
        groups = method.param_groups(byway.attach(build("bert"), method), 1e-3)
        assert [group.get("weight_decay") for group in groups] == [0.0, None]
    for group in Full().param_groups(byway.attach(build("bert"), Full()), 1e-3):
        assert all((p.ndim == 1) == ("weight_decay" in group) for p in group["params"])


def losses(model: Any, parameters: Any, x: dict[str, Any]) -> list[float]:
    optimizer, found = torch.optim.SGD(list(parameters), lr=0.1), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**x).logits.pow(2).mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert_mlm"])
def test_full_trains_as_torch_trains_the_model_itself_ties_included(family: str) -> None:
    """Llama, GPT-2, T5 and BERT's masked head are tied to the embedding: both gradients go into one tensor."""
    from tests import tiny

    torch.manual_seed(0)
    model = (tiny.bert_mlm() if family == "bert_mlm" else build(family)).eval()
    torch.manual_seed(0)
    twin = (tiny.bert_mlm() if family == "bert_mlm" else build(family)).eval()
    x = inputs("bert" if family == "bert_mlm" else family)
    adapter = byway.attach(model, Full())
    assert adapter.num_parameters == sum(p.numel() for p in twin.parameters())
    found, expected = losses(model, (p for _, p in adapter.named_parameters()), x), losses(twin, twin.parameters(), x)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]
    out = model(**x).logits.detach()
    byway.merge(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight, "the tie holds after the merge"
    assert (model(**x).logits - out).abs().max() < 1e-5
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_one_end_of_a_tie_alone_is_untied_and_noted() -> None:
    adapter = byway.attach(build("llama"), Full(targets=["lm_head"]))
    assert "embed_tokens" in adapter.notes[0] and "untied" in adapter.notes[0]


def test_chosen_layers_and_what_is_excluded_of_them() -> None:
    model = build("llama")
    layer = sum(p.numel() for p in model.model.layers[2].parameters())
    assert byway.attach(model, Full(layers=-1), "a").num_parameters == layer
    byway.detach(model, "a")
    without = byway.attach(model, Full(targets=["mlp"], layers=0, exclude=["down_proj"]))
    assert {site.path for site, _ in without.side_paths()} == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}


def test_what_reads_the_weights_of_its_parts_is_copied_whole_and_its_parts_alone_are_refused() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(2, 3, 8)
    adapter = byway.attach(model, Full())
    assert "0.self_attn" in {site.path for site, _ in adapter.side_paths()}
    model(x).pow(2).sum().backward()
    assert all(p.grad is not None for _, p in adapter.named_parameters())
    byway.detach(model)
    with pytest.raises(byway.TargetError, match=r"reads the weight .*out_proj"):
        byway.attach(model, Full(targets=["out_proj"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copies_answer_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model, x = build("llama").to(dtype), inputs("llama")
    adapter = byway.attach(model, Full(targets=["embed_tokens", "norm", "down_proj"]))
    assert {p.dtype for _, p in adapter.named_parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert model(**x).logits.dtype == dtype
