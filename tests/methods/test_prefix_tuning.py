"""Prefix tuning: the keys and values of the cache route and of HF peft, everywhere that route fails too."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import byway
from byway import LoRA, PrefixTuning
from byway.core.adapter import Adapter
from byway.core.attention import packed
from byway.engine.attention.packing import packing
from byway.methods.prefix.sides import Prefix
from tests import zoo
from tests.methods.prefixes import FP32, FP64, cache_of, direct, pairs, table_of
from tests.tiny import LAYERS, VOCABULARY, bert_mlm, build, inputs, randomize


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert", "roberta"])
def test_it_is_the_same_keys_and_values_as_a_cache_in_outputs_and_gradients(family: str, implementation: str, seed: int) -> None:
    count, length = random.Random(seed).randint(1, 6), random.Random(seed + 1).randint(2, 9)
    model = build(family, seed).double()
    model.set_attn_implementation(implementation)
    ids = inputs(family, seed, length=length)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, length - 1 :] = 0
    heads = 2 if family in ("llama", "qwen2") else 4
    adapter = byway.attach(model, direct(num_virtual_tokens=count))
    randomize(adapter.named_parameters(), scale=1.0)
    ((_, weight),) = adapter.named_parameters()
    trunk = model.base_model
    found = trunk(input_ids=ids, attention_mask=mask)[0][mask.bool()]
    found.pow(2).sum().backward()
    byway.detach(model)
    own = weight.detach().requires_grad_(True)
    wide = torch.cat([torch.ones(2, count, dtype=torch.long), mask], dim=1)
    cache = cache_of(pairs(own, LAYERS, heads), 2)
    expected = trunk(input_ids=ids, attention_mask=wide, past_key_values=cache)[0][mask.bool()]
    expected.pow(2).sum().backward()
    assert weight.grad is not None and own.grad is not None
    assert (found - expected).abs().max() < FP64
    assert (weight.grad - own.grad).norm() < FP64 * own.grad.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit"])
def test_the_mlp_makes_what_its_equation_says(family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=3, hidden_size=7, modules_to_save="none"))
    randomize(adapter.named_parameters(), scale=0.5)
    out = model(**x).logits
    prefix = next(side for _, side in adapter.side_paths() if isinstance(side, Prefix))
    rows = {}
    for name in prefix.names:
        table: Any = prefix.table(name)
        weight = torch.cat([linear.weight for linear in table.outer]).double()
        bias = torch.cat([linear.bias for linear in table.outer]).double()
        hidden = torch.tanh(table.embedding.double() @ table.inner.weight.double().T + table.inner.bias.double())
        rows[name] = hidden @ weight.T + bias
    byway.detach(model)
    plain = byway.attach(model, direct())
    with torch.no_grad():
        for name, row in rows.items():
            table_of(plain, name).weight.copy_(row)
    assert (model(**x).logits - out).abs().max() < FP32


def test_parameter_counts_of_the_paper_from_shapes_alone() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert byway.attach(model, PrefixTuning(num_virtual_tokens=5), name="mlp").num_parameters == 25_744_896
    assert byway.attach(model, PrefixTuning(num_virtual_tokens=5, hidden_size=None), name="direct").num_parameters == 245_760


def documents() -> tuple[list[Tensor], dict[str, Any]]:
    lengths = (5, 3, 6, 1)
    g = torch.Generator().manual_seed(5)
    docs = [torch.randint(3, VOCABULARY, (1, n), generator=g) for n in lengths]
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return docs, {"input_ids": torch.cat(docs, 1), "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_mlm"])
def test_packed_documents_each_see_the_prefix_and_no_other_document(family: str, implementation: str) -> None:
    torch.manual_seed(0)
    model = bert_mlm().eval() if family == "bert_mlm" else build(family)
    model.set_attn_implementation(implementation)
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=3, hidden_size=8))
    randomize(adapter.named_parameters(), scale=0.5)
    docs, batch = documents()
    alone = torch.cat([model(input_ids=doc).logits for doc in docs], dim=1)
    gradients = torch.autograd.grad(alone.pow(2).sum(), [p for _, p in adapter.named_parameters()])
    with packing(model), packed():
        together = model(**batch).logits
        packed_gradients = torch.autograd.grad(together.pow(2).sum(), [p for _, p in adapter.named_parameters()])
        batch["input_ids"][0, :5] = 7
        changed = model(**batch).logits
    assert (together - alone).abs().max() < FP32
    assert torch.equal(changed[:, 5:], together[:, 5:])
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(packed_gradients, gradients, strict=True))


@pytest.mark.parametrize("given", ["position_ids", "nothing"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_padding_on_either_side_changes_nothing_whether_positions_are_given_or_not(family: str, given: str) -> None:
    model = build(family)
    adapter = byway.attach(model, direct())
    randomize(adapter.named_parameters(), scale=1.0)
    ids, pad = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(2)), torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    trunk = model.base_model
    alone = trunk(input_ids=ids)[0]
    options = {} if given == "nothing" else {"position_ids": torch.cat([pad, torch.arange(6)[None]], dim=1)}
    left = trunk(input_ids=torch.cat([pad, ids], 1), attention_mask=mask, **options)[0][:, 3:]
    right = trunk(input_ids=torch.cat([ids, pad], 1), attention_mask=mask.flip(1))[0][:, :6]
    assert (left - alone).abs().max() < FP32
    assert (right - alone).abs().max() < FP32


def mistral(layers: int = 2) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=4, num_hidden_layers=layers, **sizes)).eval()


def test_a_sliding_window_never_hides_the_prefix() -> None:
    model = mistral(layers=1)
    adapter = byway.attach(model, direct())
    randomize(adapter.named_parameters(), scale=1.0)
    ids = torch.randint(3, VOCABULARY, (1, 15), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids, use_cache=False).logits
    out[0, -1].sum().backward()
    assert all(p.grad is not None and (p.grad != 0).all() for _, p in adapter.named_parameters())
    changed = ids.clone()
    changed[0, :5] = 7
    assert torch.equal(model(input_ids=changed, use_cache=False).logits[:, -1], out[:, -1])  # the window itself still closes
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = mistral()
    randomize(byway.attach(model, direct()).named_parameters(), scale=1.0)
    for beams in (1, 3):
        cached = model.generate(ids, use_cache=True, num_beams=beams, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, num_beams=beams, **options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_two_prefixes_stand_one_after_the_other(family: str) -> None:
    model, x = build(family), inputs(family)
    first = byway.attach(model, direct(num_virtual_tokens=2), name="first")
    second = byway.attach(model, direct(num_virtual_tokens=3), name="second")
    for seed, adapter in enumerate((first, second)):
        randomize(adapter.named_parameters(), seed=seed, scale=1.0)
    group = "encoder" if family == "bert" else "decoder"
    both = model(**x).logits
    whole = torch.cat([table_of(second, group).weight, table_of(first, group).weight]).detach()
    byway.activate(model, "first")
    assert not torch.equal(model(**x).logits, both)
    byway.detach(model, "first")
    byway.detach(model, "second")
    adapter = byway.attach(model, direct(num_virtual_tokens=5))
    with torch.no_grad():
        table_of(adapter, group).weight.copy_(whole)
    assert (model(**x).logits - both).abs().max() < FP32


def test_together_with_lora_both_act_and_both_learn() -> None:
    model, x = build("llama"), inputs("llama")
    bare = model(**x).logits
    lora, prefix = byway.attach(model, LoRA(rank=2), name="lora"), byway.attach(model, direct(), name="prefix")
    for adapter in (lora, prefix):
        randomize(adapter.named_parameters(), scale=0.5)
    both = model(**x).logits
    both.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.any() for adapter in (lora, prefix) for _, p in adapter.named_parameters())
    single = []
    for name in ("lora", "prefix"):
        byway.activate(model, name)
        single.append(model(**x).logits)
    assert not any(torch.equal(one, both) or torch.equal(one, bare) for one in single)
    with byway.disabled(model):
        assert (model(**x).logits - bare).abs().max() < 1e-6
    byway.merge(model, "lora")
    byway.activate(model, "prefix")
    assert (model(**x).logits - both).abs().max() < FP32


def gradients(model: Any, adapter: Adapter, x: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(model(**x).logits.pow(2).mean(), [p for _, p in adapter.named_parameters()]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_recomputed_layers_give_the_same_gradients_also_re_entrant_and_with_dropout(family: str, reentrant: bool) -> None:
    model, x = build(family), inputs(family)
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=3, hidden_size=8, dropout=0.3, modules_to_save="none"))
    randomize(adapter.named_parameters(), scale=0.5)
    model.train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(4)
        model(**x).logits.pow(2).mean().backward()  # re-entrant recomputation works with backward alone
        results.append([p.grad.clone() for _, p in adapter.named_parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) == len(list(adapter.named_parameters()))
    for ours, plain in zip(results[1], results[0], strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


def test_no_tensor_is_kept_between_calls() -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=2, hidden_size=8))
    model(**x).logits.sum().backward()
    for _, side in adapter.side_paths():
        assert not [name for name, value in vars(side).items() if isinstance(value, Tensor)]
        assert isinstance(side, Prefix) or not list(side.parameters())


def test_the_cache_holds_the_text_alone() -> None:
    model, x = build("llama"), inputs("llama")
    byway.attach(model, direct())
    assert model(**{**x, "use_cache": True}).past_key_values.get_seq_length() == 7


def reference_with(prefix: list[tuple[Tensor, Tensor]]) -> Any:
    """An attention function that puts `prefix` in front, one pair a call, and whose additive mask gains columns of 0."""
    calls = iter(prefix)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        own_key, own_value = (t.expand(key.shape[0], -1, -1, -1) for t in next(calls))
        mask = None if mask is None else F.pad(mask, (own_key.shape[2], 0), value=0.0)
        return sdpa_attention_forward(module, query, torch.cat([own_key, key], 2), torch.cat([own_value, value], 2), mask, **options)

    return attention


@pytest.mark.parametrize("name", ["swin", "beit"])
def test_relative_positions_that_come_as_a_mask_keep_their_values(name: str) -> None:
    values = {"use_relative_position_bias": True} if name == "beit" else {}
    torch.manual_seed(0)
    settings = zoo.config(name)
    settings.update(values)
    model = getattr(zoo.transformers, zoo.MODELS[name][0])(settings).eval()
    for path, parameter in model.named_parameters():
        if "relative_position_bias" in path:
            nn.init.normal_(parameter)
    x = zoo.inputs(model)
    adapter = byway.attach(model, direct())
    randomize(adapter.named_parameters(), scale=1.0)
    found = model(**x).logits
    table = table_of(adapter, "encoder")
    states = []
    for index, place in enumerate(table.places):
        row = table.row(index).detach().reshape(3, 2, place.heads, place.key_size).permute(1, 2, 0, 3)
        states.append((row[0], row[1]))
    byway.detach(model)
    AttentionInterface.register("reference", reference_with(states))
    AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("reference")
    assert (found - model(**x).logits).abs().max() < FP32


def test_parts_with_attentions_of_their_own_keep_them() -> None:
    chosen = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    model = zoo.transformers.CLIPModel._from_config(zoo.config("clip"), attn_implementation=chosen)
    now = lambda: [m.config._attn_implementation for m in (model, model.text_model, model.vision_model)]  # noqa: E731
    assert now() == ["sdpa", "eager", "sdpa"]
    byway.attach(model, direct())
    assert now() == ["byway_sdpa", "byway_eager", "byway_sdpa"]
    model(**zoo.inputs(model))
    byway.detach(model)
    assert now() == ["sdpa", "eager", "sdpa"]


def test_every_other_family_takes_a_prefix_and_gives_it_a_gradient() -> None:
    refused = []
    for name in zoo.MODELS:
        model = zoo.build(name)
        try:
            adapter = byway.attach(model, direct())
        except byway.AdapterError:
            refused.append(zoo.MODELS[name][0].split("For")[0])
            continue
        model(**zoo.inputs(model))[0].float().pow(2).mean().backward()
        assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == [], name
    assert set(refused) == {"GPTNeo", "GPTJ", "CodeGen", "Bloom", "Falcon", "Mpt", "MPNet", "Deberta", "DebertaV2"}
