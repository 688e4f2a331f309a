"""Ladder Side-Tuning against the paper's numbers and formulas written out by hand; generation, packing, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import byway
from byway.core.attention import packed
from byway.core.families.blocks import KINDS
from byway.engine.attention.packing import packing
from byway.methods.ladder.network import mixed
from tests import zoo
from tests.methods.ladders import attached, ladders
from tests.tiny import DECODERS, VOCABULARY, build, inputs, llama

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())


def golden_matrix(code: str) -> torch.Tensor:
    """``M(a,b,p,q,m,c)`` of the golden file: ((i·p + j·q) mod m − c) / 10."""
    a, b, p, q, m, c = (int(x) for x in code.removeprefix("M(").removesuffix(")").split(","))
    return torch.tensor([[((i * p + j * q) % m - c) / 10 for j in range(b)] for i in range(a)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("sizes", "chosen", "count"),
    [
        ({"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, {"drop": [0, 4, 8]}, 3_878_712),
        ({"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}, {"keep": list(range(1, 24, 2))}, 9_057_328),
        ({"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}, {"keep": 23}, 2_494_896),
    ],
    ids=["T5-base", "T5-large", "T5-3B"],
)
def test_parameter_counts_are_the_papers(sizes: dict[str, int], chosen: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(vocab_size=32128, **sizes))
    assert byway.attach(model, byway.LadderSideTuning(reduction=8, **chosen)).num_parameters == count


@pytest.mark.parametrize("case", ["alpha0", "alpha005"])
def test_a_gate_mixes_as_the_golden_case_says(case: str) -> None:
    golden = GOLDEN["lst_gate"]
    side, rung, weight = (golden_matrix(golden[key]) for key in ("h_side", "h_backbone", "W_down"))
    down = rung @ weight.T + torch.tensor(golden["b_down"], dtype=torch.float64)
    alpha = torch.tensor(golden[case]["alpha"], dtype=torch.float64, requires_grad=True)
    out = mixed(side, down, alpha, golden["T"])
    assert (out - torch.tensor(golden[case]["mixed"], dtype=torch.float64)).abs().max() < 1e-7
    out.sum().backward()
    mu = golden[case]["mu"]
    assert float(alpha.grad) == pytest.approx(float((side - down).sum()) * mu * (1 - mu) / golden["T"], rel=1e-6)


def outputs_of_blocks(model: Any, layers: Any, run: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(e, [b_i]) of the bare base, read with hooks of the test's own."""
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    handles = [layers[0].register_forward_pre_hook(lambda m, a: entered.append(a[0]))]
    handles += [layer.register_forward_hook(lambda m, a, o: left.append(o[0] if isinstance(o, tuple) else o)) for layer in layers]
    with torch.no_grad(), byway.disabled(model):
        run()
    for handle in handles:
        handle.remove()
    return entered[0], left


@pytest.mark.parametrize("gate", ["learned", "fixed", "add"])
def test_with_identity_blocks_output_and_gradients_are_the_formula(gate: Any, seed: int) -> None:
    model = build("llama").double()
    attached(model, reduction=4, drop=[1], gate=gate, mix_output=True)
    (ladder,) = ladders(model)
    for block in ladder.side_block.values():  # what a block adds to its input is zero
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            nn.init.zeros_(block.get_submodule(name).weight)
    x = inputs("llama")
    e, b = outputs_of_blocks(model, model.model.layers, lambda: model(**x))
    with torch.no_grad(), byway.disabled(model):
        last = model.model(**x).last_hidden_state
    own = {name: p.detach().clone().requires_grad_(True) for name, p in ladder.named_parameters()}

    def linear(name: str, z: torch.Tensor) -> torch.Tensor:
        return z @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    h = linear("side_first_downsample", e)
    for i in (0, 2):
        rung = linear(f"side_downsamples.{i}", b[i])
        mu = torch.sigmoid(own["side_gate_params"][i] / 0.1) if gate == "learned" else 0.5
        h = h + rung if gate == "add" else mu * h + (1 - mu) * rung
    z = h.float()  # as transformers' norm, which computes in float32 whatever it gets
    h = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)).double() * own["final_side_layer_norm.weight"]
    g = torch.sigmoid(own["final_gate"] / 0.1)
    expected = (g * linear("side_final_upsample", h) + (1 - g) * last) @ model.lm_head.weight.T
    found = model(**x).logits
    assert (found - expected).abs().max() < 1e-12
    expected.square().mean().backward()
    found.square().mean().backward()
    for name, p in ladder.named_parameters():
        want = own[name].grad
        if want is not None:
            assert p.grad is not None
            assert (p.grad - want).norm() <= 1e-6 * want.norm(), name


def test_side_blocks_are_run_as_a_narrow_t5_would_run_them() -> None:
    """Both stacks by hand, with the side blocks as ordinary T5 blocks: masks, one position bias, cross-attention to the side encoder."""
    model = build("t5").double()
    attached(model, reduction=2, drop=[0])
    encoder, decoder = ladders(model)
    x = inputs("t5")
    mask = torch.ones_like(x["input_ids"])
    mask[0, 5:] = 0
    x["attention_mask"] = mask
    sides: list[torch.Tensor] = []
    for ladder, stack in ((encoder, model.encoder), (decoder, model.decoder)):
        e, b = outputs_of_blocks(model, stack.block, lambda: model(**x))
        h = ladder.side_first_downsample(e)
        t = h.shape[1]
        own = mask.bool()[:, None, None, :].expand(-1, 1, t, -1) if not sides else torch.ones(t, t, dtype=torch.bool).tril()[None, None]
        extra: tuple[Any, ...] = (None, None) if not sides else (sides[0], mask.bool()[:, None, None, :].expand(-1, 1, t, -1))
        bias = cross = None
        for i in (1, 2):
            mu = torch.sigmoid(ladder.side_gate_params[i] / 0.1)
            h = mu * h + (1 - mu) * ladder.side_downsamples[str(i)](b[i])
            h, bias, cross = ladder.side_block[str(i)](h, own, bias, *extra, cross)
        sides.append(ladder.final_side_layer_norm(h))
    expected = model.lm_head(decoder.side_final_upsample(sides[1]) * 32**-0.5)
    assert (model(**x).logits - expected).abs().max() < 1e-12
    tables = [n for n, _ in model.named_parameters() if ".byway." in n and n.endswith("relative_attention_bias.weight")]
    table = "byway.default.side_block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert tables == [f"encoder.{table}", f"decoder.{table}"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model = build(family)
    attached(model, drop=[1])
    ids = inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_equal_documents_alone(family: str) -> None:
    model = build(family)
    attached(model)
    g = torch.Generator().manual_seed(4)
    documents = [torch.randint(3, VOCABULARY, (1, n), generator=g) for n in (4, 7, 2)]
    starts = torch.tensor([0, 4, 11, 13], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=d, use_cache=False).logits for d in documents], dim=1)
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        with packing(model), packed():
            together = model(
                input_ids=torch.cat(documents, 1), position_ids=positions, cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False
            ).logits
        assert (together - alone).abs().max() < 1e-5
        again = torch.cat([model(input_ids=d, use_cache=False).logits for d in documents], dim=1)
    assert torch.equal(again, alone)


def test_a_base_in_bfloat16_and_one_that_attends_eagerly() -> None:
    for change in ("bf16", "eager"):
        model, x = build("llama"), inputs("llama")
        x["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        if change == "bf16":
            model.to(torch.bfloat16)
        else:
            model.set_attn_implementation("eager")
        adapter = attached(model)
        out = model(**x).logits
        assert out.dtype == model.dtype
        assert {p.dtype for _, p in adapter.named_parameters()} == {torch.float32}
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in adapter.named_parameters())
        model.generate(x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=3, pad_token_id=0)


def test_a_ladder_on_a_classifier_trains_its_head_too() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    adapter = byway.attach(BertForSequenceClassification(config), byway.LadderSideTuning())
    assert any(name.startswith("classifier.byway.") for name, _ in adapter.named_parameters())


def test_a_ladder_learns() -> None:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2)
    adapter = byway.attach(model, byway.LadderSideTuning())
    optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=3e-2)
    ids = (torch.arange(12)[None] + torch.arange(4)[:, None]) % 20 + 3
    losses = []
    model.train()
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if zoo.config(name).model_type in KINDS])
def test_every_kind_in_the_table_climbs_learns_and_generates(name: str) -> None:
    model = zoo.build(name)
    x = zoo.inputs(model)
    adapter = attached(model)
    out = model(**x)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    if "input_ids" in x and model.can_generate():
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = x["input_ids"]
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
