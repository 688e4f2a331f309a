"""(IA)³ against the golden case, HF peft, T-Few's own formulation, and the counts of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import byway
from byway.methods.ia3 import IA3, BlockScale, InputScale, OutputScale
from tests import unlisted
from tests.tiny import build, inputs

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())
PEFT = 1e-5


def m(spec: str) -> Tensor:
    a, b, p, q, mod, c = (int(x) for x in spec[2 : spec.index(")")].split(","))
    return torch.tensor([[(((i * p + j * q) % mod) - c) / 10 for j in range(b)] for i in range(a)])


def fill(adapter: byway.Adapter, seed: int = 3) -> None:
    """Numbers around one, one of them zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in adapter.named_parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape, generator=g))
        next(p for n, p in adapter.named_parameters() if n.endswith("ia3_l")).flatten()[0] = 0.0


def kinds(model: nn.Module) -> dict[str, type]:
    return {site.path: type(side) for site, _, side in byway.side_paths(model)}


def test_golden_forward_and_merge() -> None:
    case = GOLDEN["ia3"]
    k, ff = nn.Linear(6, 4), nn.Linear(4, 3)
    k.weight.data.copy_(m(GOLDEN["inputs"]["W"]))
    k.bias.data.copy_(torch.tensor(GOLDEN["inputs"]["bias"]))
    ff.weight.data.copy_(m(case["ff_weight"]))
    ff.bias.data.copy_(torch.tensor(case["ff_bias"]))
    model = nn.Sequential(k, nn.ReLU(), ff)
    byway.attach(model, IA3(targets=["0", "2"], feed_forward=["2"]))
    sides = {site.path: side for site, _, side in byway.side_paths(model)}
    with torch.no_grad():
        sides["0"].ia3_l.copy_(torch.tensor(case["l_k"])[:, None])
        sides["2"].ia3_l.copy_(torch.tensor(case["l_ff"])[None])
    x = m(GOLDEN["inputs"]["X"])
    assert (model(x) - torch.tensor(case["y"])).abs().max() <= 2e-6
    byway.merge(model)
    assert (model(x) - torch.tensor(case["y"])).abs().max() <= 2e-6
    for found, expected in (
        (k.weight, "merged_k_weight"),
        (k.bias, "merged_k_bias"),
        (ff.weight, "merged_ff_weight"),
        (ff.bias, "merged_ff_bias"),
    ):
        assert (found - torch.tensor(case[expected])).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("family", "outputs", "at_input"),
    [
        ("llama", ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
        ("bert", ["attention.self.key", "attention.self.value"], ["layer.0.output.dense"]),
        ("t5", ["SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"], ["DenseReluDense.wo"]),
        ("opt", ["k_proj", "v_proj"], ["fc2"]),
        ("vit", ["k_proj", "v_proj"], ["fc2"]),
    ],
)
def test_the_papers_places_are_the_default(family: str, outputs: list[str], at_input: list[str]) -> None:
    model = build(family)
    byway.attach(model, IA3())
    found = kinds(model)
    first = {p: k for p, k in found.items() if ".0." in p and k in (InputScale, OutputScale)}
    assert {p for p, k in first.items() if k is OutputScale} == {p for p in first if p.endswith(tuple(outputs))}
    assert {p for p, k in first.items() if k is InputScale} == {p for p in first if p.endswith(tuple(at_input))}
    assert not [p for p in found if p.endswith(("attention.output.dense", "q_proj", "query", ".q"))]


def test_of_a_fused_map_only_keys_and_values_are_scaled(seed: int) -> None:
    model, x = build("gpt2"), inputs("gpt2")
    adapter = byway.attach(model, IA3())
    side = next(s for _, s in adapter.side_paths() if isinstance(s, BlockScale))
    assert side.ia3_l.shape == (64, 1)
    fill(adapter)
    c_attn = model.transformer.h[0].attn.c_attn
    hidden = torch.randn(2, 32)
    with byway.disabled(model):
        plain = c_attn(hidden)
    assert torch.equal(c_attn(hidden)[:, :32], plain[:, :32])
    assert torch.allclose(c_attn(hidden)[:, 32:], plain[:, 32:] * side.ia3_l.flatten(), atol=1e-6)
    assert model(**x).logits.isfinite().all()


def test_scaling_the_input_of_wo_is_t_fews_scaling_of_the_output_of_wi_1(seed: int) -> None:
    """Gated T5: h = gelu(wi_0 x)∘(wi_1 x), so l∘h is what T-Few's code computes by scaling wi_1."""
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )
    ours = transformers.T5ForConditionalGeneration(config).eval()
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.load_state_dict(ours.state_dict())
    a = byway.attach(ours, IA3(targets=["wo"], feed_forward=["wo"]))
    b = byway.attach(theirs, IA3(targets=["wi_1"], feed_forward=[]))
    fill(a)
    with torch.no_grad():
        for (_, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            q.copy_(p.T)
    x = inputs("t5")
    assert torch.allclose(ours(**x).logits, theirs(**x).logits, atol=1e-6)


def test_counts_of_the_paper_from_shapes_alone() -> None:
    def count(model: nn.Module) -> int:
        return byway.attach(model, IA3(modules_to_save="none")).num_parameters

    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
        )
        # 13 GB of weights if they were there
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    assert count(t5) == 129_024
    assert count(llama) == 614_400


def test_keys_and_values_of_grouped_queries_have_their_own_size() -> None:
    model = build("llama")
    adapter = byway.attach(model, IA3(layers=0))
    assert [tuple(p.shape) for _, p in adapter.named_parameters()] == [(16, 1), (16, 1), (1, 64)]


def test_weight_decay_leaves_the_vectors_alone_and_acts_on_the_head() -> None:
    model = build("bert")
    adapter = byway.attach(model, IA3())
    vectors, heads = adapter.method.param_groups(adapter, 1e-3)
    assert vectors["weight_decay"] == 0.0 and "weight_decay" not in heads
    optimizer = torch.optim.AdamW([vectors, heads], lr=1e-3, weight_decay=0.5)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    before = heads["params"][0].detach().clone()
    optimizer.step()
    assert all(bool((p == 1).all()) for p in vectors["params"])
    assert not torch.equal(heads["params"][0], before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert", "t5"])
def test_output_and_gradients_equal_pefts_whose_file_we_load(family: str, seed: int, tmp_path: Path) -> None:
    """peft's own table of targets; its (out, 1) and (1, in) vectors, random."""
    x = inputs(family)
    wrapped = peft.get_peft_model(build(family), peft.IA3Config(task_type="SEQ_CLS" if family == "bert" else None))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "ia3_l" in name:
                p.copy_(1 + 0.3 * torch.randn(p.shape))
    wrapped.save_pretrained(tmp_path)
    ours = build(family)
    adapter = byway.load(ours, tmp_path, trainable=True)
    expected = wrapped.eval()(**x).logits
    assert (ours(**x).logits - expected).abs().max() <= PEFT
    expected.pow(2).mean().backward()
    ours(**x).logits.pow(2).mean().backward()
    theirs = {n.removeprefix("base_model.model.").partition(".ia3_l")[0]: p.grad for n, p in wrapped.named_parameters() if "ia3_l" in n}
    mine = {n.partition(".byway.")[0]: p.grad for n, p in adapter.named_parameters() if n.endswith("ia3_l")}
    assert mine.keys() == theirs.keys()
    for path, gradient in mine.items():
        assert gradient is not None and theirs[path] is not None
        assert (gradient - theirs[path]).norm() <= 1e-5 * theirs[path].norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "roberta", "vit"])
def test_what_we_write_peft_loads_with_equal_logits(family: str, tmp_path: Path) -> None:
    """Also where short names would match too much: BERT's attention.output.dense, GPT-2's attn.c_proj."""
    x = inputs(family)
    model = build(family)
    adapter = byway.attach(model, IA3())
    fill(adapter)
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "a")).eval()
    assert (theirs(**x).logits - model(**x).logits).abs().max() <= PEFT
    wrapped = {n.partition(".ia3_l")[0] for n, _ in theirs.named_parameters() if "ia3_l" in n}
    assert len(wrapped) == sum(isinstance(side, InputScale | OutputScale) for _, side in adapter.side_paths())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_equal_pefts_and_merge(feed_forward: bool, groups: int, seed: int) -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feed_forward else [])
    theirs = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)), config)
    theirs.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
    adapter = byway.attach(base, IA3(targets=["0"], feed_forward=["0"] if feed_forward else []))
    ((_, vector),) = adapter.named_parameters()
    with torch.no_grad():
        vector.copy_(torch.randn_like(vector))
        theirs.base_model.model[0].ia3_l["default"].copy_(vector)
    x = torch.randn(2, 4, 7, 7)
    out = base(x).detach()
    assert torch.allclose(out, theirs(x), atol=1e-6)
    byway.merge(base)
    assert torch.allclose(base(x), out, atol=1e-5)


@pytest.mark.parametrize("seeded", range(3))
def test_output_and_gradients_equal_the_formula_in_float64(seed: int, seeded: int) -> None:
    rng = np.random.default_rng([seed, seeded])
    inside, hidden, out = (int(v) for v in rng.integers(3, 30, 3))
    model = nn.Sequential(nn.Linear(inside, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()
    adapter = byway.attach(model, IA3(targets=["0", "2"], feed_forward=["2"]))
    fill(adapter, seeded)
    (_, k), (_, ff) = adapter.named_parameters()
    x = torch.randn(5, inside, dtype=torch.float64)
    p, q = k.detach().clone().requires_grad_(), ff.detach().clone().requires_grad_()
    w0, b0, w1, b1 = (t.detach() for t in (model[0].weight, model[0].bias, model[2].weight, model[2].bias))
    reference = (q.flatten() * torch.tanh(p.flatten() * (x @ w0.T + b0))) @ w1.T + b1
    assert torch.allclose(model(x), reference, atol=1e-12)
    reference.pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    assert torch.allclose(k.grad, p.grad, atol=1e-10) and torch.allclose(ff.grad, q.grad, atol=1e-10)  # pyright: ignore


def test_a_vector_learnt_beside_bfloat16_is_not_rounded_away() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    ((_, vector),) = byway.attach(model, IA3(targets=["0"], feed_forward=[])).named_parameters()
    assert vector.dtype == torch.float32
    with torch.no_grad():
        vector.fill_(1.003)  # 1.0 in bfloat16
    x = torch.randn(64, 8).to(torch.bfloat16)
    with byway.disabled(model):
        plain = model(x)
    assert torch.equal(model(x), (plain.float() * 1.003).to(torch.bfloat16))
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"targets": []}, byway.ConfigError, r"targets is \[\]"),
        ({"targets": ["k_prj"]}, byway.TargetError, "did you mean 'k_proj'"),
        ({"targets": ["norm"]}, byway.TargetError, "does not support it"),
        ({"feed_forward": ["dwn_proj"]}, byway.TargetError, "did you mean 'down_proj'"),
        ({"layers": 7}, byway.TargetError, "7"),
    ],
)
def test_what_is_wrong_is_named_and_the_model_untouched(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=says):
        byway.attach(model, IA3(**options))
    assert byway.adapters(model) == {}


def test_a_model_whose_keys_and_values_cannot_be_told_says_what_to_pass() -> None:
    with pytest.raises(byway.TargetError, match="name them: targets"):
        byway.attach(nn.Sequential(nn.Linear(3, 3)), IA3())


@pytest.mark.parametrize(
    ("name", "attention", "end"),
    [
        ("gemma4_text", ["k_proj", "v_proj"], "down_proj"),
        ("gemma3n_text", ["k_proj", "v_proj"], "down_proj"),
        ("falcon_h1", ["k_proj", "v_proj"], "down_proj"),
        ("modernbert-decoder", ["k_proj", "v_proj"], "mlp.Wo"),
        ("lfm2", ["k_proj", "v_proj"], "w2"),
        ("qwen2_5_vl", ["k_proj", "v_proj"], "down_proj"),
    ],
)
def test_unlisted_families_are_scaled_where_peft_scales_them_if_it_is_told(name: str, attention: list[str], end: str) -> None:
    model = unlisted.build(name)
    mine = byway.attach(model, IA3())
    theirs = peft.get_peft_model(unlisted.build(name), peft.IA3Config(target_modules=[*attention, end], feedforward_modules=[end]))
    places = {n.partition(".ia3_l")[0].removeprefix("base_model.model."): p.numel() for n, p in theirs.named_parameters() if "ia3_l" in n}
    assert {n.partition(".byway.")[0]: p.numel() for n, p in mine.named_parameters()} == places
    assert not any("3-D" in note or "last feed-forward map" in note for note in mine.notes)


def test_layers_left_out_are_named_with_the_true_reason() -> None:
    notes = byway.attach(unlisted.build("phimoe"), IA3()).notes
    assert "keys and values only in 2 of 2 layers, whose experts are 3-D parameters" in notes
    (note,) = byway.attach(unlisted.build("qwen2_5_vl"), IA3()).notes
    assert note.startswith("feed-forward part only in 2 of 4 layers (model.visual.blocks.0, model.visual.blocks.1)")
