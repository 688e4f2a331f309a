"""Ladder Side-Tuning against the paper's numbers, formulas written out by hand, and what must never happen to the backbone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import byway
from byway.engine.attention import packed, packing
from byway.errors import AdapterError, ConfigError, TargetError
from byway.families import facts
from byway.ladder.kinds import KINDS
from byway.ladder.network import Ladder, mixed
from byway.methods import ladder_side_tuning
from byway.slots import base_modules
from tests import zoo
from tests.tiny import DECODERS, FAMILIES, VOCABULARY, build, inputs, llama, randomize

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())


def hung(model: nn.Module, **fields: Any) -> Any:
    adapter = byway.attach(model, byway.LadderSideTuning(**fields))
    randomize(adapter.named_parameters(), scale=0.5)
    return adapter


def ladders(model: nn.Module) -> list[Ladder]:
    return [side for _, _, side in byway.side_paths(model) if isinstance(side, Ladder)]


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
    hung(model, reduction=4, drop=[1], gate=gate, mix_output=True)
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
    hung(model, reduction=2, drop=[0])
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


class _Inside:
    """How many tensors are saved for the backward pass while a layer of the backbone runs."""

    def __init__(self, model: Any) -> None:
        self.depth = self.saved = 0
        stacks = facts(model).stacks.values()
        self.handles: list[Any] = []
        for path in (p for layers in stacks for p in layers):
            layer = model.get_submodule(path)
            self.handles.append(layer.register_forward_pre_hook(self._enter, prepend=True))
            self.handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.depth -= 1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved += self.depth > 0
        return tensor


def saved_inside(model: Any, x: dict[str, Any]) -> int:
    counter = _Inside(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t):
        loss = model(**x).logits.square().mean()
    for handle in counter.handles:
        handle.remove()
    loss.backward()
    return counter.saved


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_keeps_nothing_and_gets_no_gradient(family: str) -> None:
    model, x = build(family), inputs(family)
    byway.attach(model, byway.LoRA())
    assert saved_inside(model, x) > 0, "the count must see what another method keeps"
    byway.detach(model)
    hung(model)
    model.train()
    assert saved_inside(model, x) == 0
    model.gradient_checkpointing_enable()
    assert saved_inside(model, x) == 0
    super(type(model), model).gradient_checkpointing_disable()  # transformers' own, which leaves its hook on the embedding
    assert saved_inside(model, x) == 0
    assert [n for n, p in model.named_parameters() if p.grad is not None and ".byway." not in n] == []


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_backbone_stays_in_evaluation_mode_and_detach_gives_it_back(family: str) -> None:
    model, x = build(family).train(), inputs(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    hung(model)
    model.train()
    layers = [model.get_submodule(p) for stack in facts(model).stacks.values() for p in stack]
    assert model.training
    assert not any(m.training for layer in layers for _, m in base_modules(layer))
    assert all(ladder.training for ladder in ladders(model))
    if family != "llama":  # the ladder's own dropout acts
        torch.manual_seed(1)
        first = model(**x).logits
        assert not torch.equal(first, model(**x).logits)
    byway.detach(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model = build(family)
    hung(model, drop=[1])
    ids = inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_the_caches_hold_side_layers_behind_those_of_the_backbone() -> None:
    model = build("t5")
    hung(model, reduction=4, keep=[1, 2])
    x = inputs("t5") | {"use_cache": True}
    cache = model(**x).past_key_values
    for part, length in ((cache.self_attention_cache, 5), (cache.cross_attention_cache, 7)):
        assert [tuple(layer.keys.shape) for layer in part.layers] == [(2, 4, length, 8)] * 3 + [(2, 4, length, 2)] * 2


def test_caches_that_cannot_grow_or_are_out_of_step_are_refused() -> None:
    model = build("llama")
    hung(model)
    ids = inputs("llama")["input_ids"]
    with pytest.raises(AdapterError, match="StaticCache has no room"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(AdapterError, match="StaticCache has no room"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    cache = DynamicCache(config=model.config)
    with byway.disabled(model):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(AdapterError, match="7 tokens of the backbone and 0 of the ladder"):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_failing_forward_leaves_nothing_behind() -> None:
    model, x = build("llama"), inputs("llama")
    hung(model)
    out = model(**x).logits
    handle = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(**x)
    handle.remove()
    assert torch.equal(model(**x).logits, out)
    copy.deepcopy(model)


def test_what_is_trained_below_is_refused_in_either_order() -> None:
    model, x = build("llama"), inputs("llama")
    byway.attach(model, byway.LoRA(), name="low")
    with pytest.raises(AdapterError, match="'low' is trained inside model, below the ladder"):
        byway.attach(model, byway.LadderSideTuning())
    byway.detach(model, "low")
    hung(model)
    byway.attach(model, byway.LoRA(), name="low")
    with pytest.raises(AdapterError, match="'low' is trained below a ladder"):
        model(**x)
    byway.detach(model, "low")
    byway.attach(model, byway.LoRA(targets=["embed_tokens"]), name="low")
    with pytest.raises(AdapterError, match="'low' is trained below a ladder"):
        model(**x)


def test_a_frozen_adapter_below_is_part_of_the_backbone(tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    lora = byway.attach(model, byway.LoRA(), name="low")
    randomize(lora.named_parameters())
    lora.save(tmp_path / "low")
    byway.detach(model, "low")
    byway.load(model, tmp_path / "low", name="low")
    ladder = hung(model)
    with_lora = model(**x).logits
    with_lora.square().mean().backward()
    assert all(p.grad is not None for _, p in ladder.named_parameters())
    byway.activate(model, "default")
    assert not torch.equal(model(**x).logits, with_lora)


def test_two_ladders_take_turns() -> None:
    model, x = build("bert"), inputs("bert")
    first = byway.attach(model, byway.LadderSideTuning(modules_to_save="none"), name="a")
    randomize(first.named_parameters(), seed=1, scale=0.5)
    out = model(**x).logits
    second = byway.attach(model, byway.LadderSideTuning(modules_to_save="none"), name="b")
    randomize(second.named_parameters(), seed=2, scale=0.5)
    with pytest.raises(AdapterError, match="two ladders are active"):
        model(**x)
    byway.activate(model, "b")
    assert not torch.equal(model(**x).logits, out)
    byway.activate(model, "a")
    assert torch.equal(model(**x).logits, out)
    byway.detach(model, "b")
    model.train()
    assert not model.bert.encoder.layer[0].training


def test_encoder_states_made_without_the_ladder_are_refused() -> None:
    model, x = build("t5"), inputs("t5")
    with torch.no_grad():
        states = model.encoder(x["input_ids"])
    hung(model)
    with pytest.raises(AdapterError, match="encoder states of width 32, not 36"):
        model(encoder_outputs=states, decoder_input_ids=x["decoder_input_ids"])
    with torch.no_grad():
        own = model.encoder(x["input_ids"])
        assert torch.equal(model(encoder_outputs=own, decoder_input_ids=x["decoder_input_ids"]).logits, model(**x).logits)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_hidden_states_asked_for_are_the_backbones(family: str) -> None:
    model, x = build(family), inputs(family)
    with torch.no_grad():
        bare = model(**x, output_hidden_states=True, output_attentions=True)
    hung(model)
    model._output_capturing_hooks_installed = False  # as if they were asked for after attach for the first time
    out = model(**x, output_hidden_states=True, output_attentions=True)
    for field in ("hidden_states", "attentions", "encoder_hidden_states", "decoder_hidden_states"):
        if bare.get(field) is not None:
            assert len(out[field]) == len(bare[field])
            assert all(torch.equal(a, b) for a, b in zip(out[field][:-1], bare[field][:-1], strict=True))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_pooler_reads_what_the_ladder_gives(family: str) -> None:
    from transformers import ViTModel

    model = build(family).bert if family == "bert" else ViTModel(build("vit").config).eval()
    hung(model)
    out = model(**inputs(family))
    assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_equal_documents_alone(family: str) -> None:
    model = build(family)
    hung(model)
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


def enlarged(small: Any, big: Any, every: int) -> dict[str, torch.Tensor]:
    """The small Llama inside a big one: its coordinates scattered among zeros, rotated pairs staying pairs."""
    d, e = small.config.hidden_size, small.config.head_dim
    state = {k: torch.zeros_like(v) for k, v in big.state_dict().items()}

    def spread(n: int, heads: bool) -> torch.Tensor:
        if not heads:
            return every * torch.arange(n) + 1
        half, wide = torch.arange(e // 2) * every + 1, e * every // 2
        return torch.cat([torch.cat([half, half + wide]) + h * e * every for h in range(n // e)])

    for key, value in small.state_dict().items():
        heads_out = any(p in key for p in ("q_proj", "k_proj", "v_proj"))
        rows = torch.arange(len(value)) if "embed" in key or "lm_head" in key else spread(len(value), heads_out)
        if value.ndim == 1:
            state[key][rows] = value
        else:
            state[key][rows[:, None], spread(value.shape[1], "o_proj" in key)] = value
    assert d * every == big.config.hidden_size
    return state


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_pruning_finds_a_small_model_that_is_hidden_in_a_large_one(init: Any) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, head_dim=4, **sizes)).eval()
    big = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=72, head_dim=12, **sizes)).eval()
    big.load_state_dict(enlarged(small, big, 3))
    before = {k: v.clone() for k, v in big.state_dict().items()}
    flags = [p.requires_grad for p in big.parameters()]
    ids = torch.randint(3, 50, (3, 6))
    method = byway.LadderSideTuning(reduction=3, init=init)
    byway.attach(big, method, batches=[{"input_ids": ids, "labels": ids}])
    (ladder,) = ladders(big)
    for index, block in ladder.side_block.items():
        for name, tensor in small.model.layers[int(index)].state_dict().items():
            assert torch.equal(block.state_dict()[name], tensor), (index, name)
    assert torch.equal(ladder.final_side_layer_norm.weight, small.model.norm.weight)
    assert all(torch.equal(v, before[k]) for k, v in byway.base_state_dict(big).items())
    byway.detach(big)
    assert [p.requires_grad for p in big.parameters()] == flags


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_blocks_are_made_of_the_backbones_own_numbers(family: str) -> None:
    model = build(family)
    byway.attach(model, byway.LadderSideTuning(keep=[1]))
    layers = [model.get_submodule(stack[1]) for stack in facts(model).stacks.values()]
    for layer, ladder in zip(layers, ladders(model), strict=True):
        wide = dict(model.named_parameters())
        names = dict(layer.named_parameters())
        for name, tensor in ladder.side_block["1"].named_parameters():
            source = names.get(name)
            if source is None:  # the position bias moves to the first kept block
                source = wide[f"{'encoder' if ladder.role == 'encoder' else 'decoder'}.block.0.{name}"]
                assert torch.equal(source, tensor)
            assert torch.isin(tensor, source).all(), name
            assert tensor.unique().numel() > 1 or tensor.numel() == 1


def test_fisher_is_the_sum_of_squared_gradients_of_single_rows() -> None:
    from byway.ladder.importance import fisher

    model, x = build("bert"), inputs("bert", rows=3)
    batch = {**x, "labels": torch.tensor([0, 2, 1])}
    module = model.bert.encoder.layer[1].intermediate.dense
    found = fisher(model, [module, model.bert.embeddings.word_embeddings], [batch, batch])(module)
    expected = torch.zeros_like(module.weight, dtype=torch.float64)
    for _ in range(2):
        for i in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(x["input_ids"][i : i + 1]).logits, batch["labels"][i : i + 1]).backward()
            expected += module.weight.grad.double() ** 2
    assert (found - expected).abs().max() <= 1e-6 * expected.max()


def test_fisher_without_labels_says_so() -> None:
    model = build("llama")
    for batches in (None, [], [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]):
        with pytest.raises(ConfigError, match="needs calibration batches with labels"):
            byway.attach(model, byway.LadderSideTuning(init="fisher"), batches=batches)
    assert byway.adapters(model) == {}


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_loading_needs_no_batches_and_prunes_nothing(init: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("llama"), inputs("llama")
    ids = x["input_ids"]
    adapter = byway.attach(model, byway.LadderSideTuning(init=init, drop=[0]), batches=[{"input_ids": ids, "labels": ids}])
    out = model(**x).logits
    adapter.save(tmp_path / "ladder")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a start is computed for tensors that the file fills")

    monkeypatch.setattr(ladder_side_tuning, "prune", never)
    monkeypatch.setattr(ladder_side_tuning, "fisher", never)
    other = build("llama")
    loaded = byway.load(other, tmp_path / "ladder")
    assert torch.equal(other(**x).logits, out)
    assert loaded.method == adapter.method


def test_the_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> list[torch.Tensor]:
        model = build("llama")
        torch.manual_seed(seed)
        return [p.detach() for _, p in byway.attach(model, byway.LadderSideTuning(init="random")).named_parameters()]

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_samplers_start_small_and_gates_at_a_half() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4))
    byway.attach(model, byway.LadderSideTuning())
    (ladder,) = ladders(model)
    for linear in (ladder.side_first_downsample, *ladder.side_downsamples.values(), ladder.side_final_upsample):
        assert 0.0095 < float(linear.weight.detach().std()) < 0.0105
        assert not linear.bias.any()
    assert not ladder.side_gate_params.any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reduction": 0}, "reduction is 0"),
        ({"reduction": True}, "reduction is True"),
        ({"keep": [0], "drop": [1]}, "keep and drop are both given"),
        ({"init": "pruned"}, "init is 'pruned'"),
        ({"gate": "open"}, "gate is 'open'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"init": "x", "gate": "y"}, "init is 'x'.*gate is 'y'"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        byway.LadderSideTuning(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"reduction": 8}, ConfigError, "reduction 8 does not divide .*\nhint: the largest reductions that fit: 4, 2, 1"),
        ({"reduction": 3}, ConfigError, "reduction 3 does not divide hidden_size 32"),
        ({"drop": [7]}, TargetError, "drop 7 is out of range: decoder has 3 layers"),
        ({"keep": "encoder:0"}, TargetError, "there is no stack 'encoder'"),
        ({"drop": "0-"}, TargetError, "no layer of the decoder keeps a side block"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(fields: dict[str, Any], error: Any, says: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=says):
        byway.attach(model, byway.LadderSideTuning(**fields))
    assert byway.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_a_family_without_side_blocks_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(TargetError, match="no side blocks are known for a 'bloom' model"):
        byway.attach(model, byway.LadderSideTuning())
    with pytest.raises(TargetError, match="no side blocks are known for Linear"):
        byway.attach(nn.Linear(3, 3), byway.LadderSideTuning())


def test_a_base_in_bfloat16_and_one_that_attends_eagerly() -> None:
    for change in ("bf16", "eager"):
        model, x = build("llama"), inputs("llama")
        x["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        if change == "bf16":
            model.to(torch.bfloat16)
        else:
            model.set_attn_implementation("eager")
        adapter = hung(model)
        out = model(**x).logits
        assert out.dtype == model.dtype
        assert {p.dtype for _, p in adapter.named_parameters()} == {torch.float32}
        out.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in adapter.named_parameters())
        model.generate(x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=3, pad_token_id=0)


def test_switching_the_attention_afterwards_switches_the_side_blocks() -> None:
    model, x = build("llama"), inputs("llama")
    hung(model)
    out = model(**x).logits
    model.set_attn_implementation("eager")
    assert (model(**x).logits - out).abs().max() < 1e-5
    assert ladders(model)[0].config._attn_implementation == "eager"


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
    adapter = hung(model)
    out = model(**x)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    if "input_ids" in x and model.can_generate():
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = x["input_ids"]
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
