"""The attention seam: prefixes act as concatenated keys and values, and packed documents do not see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway
from byway.core.attention import packed
from byway.core.families import facts
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site
from byway.engine.attention.packing import packing
from tests.tiny import DECODERS, VOCABULARY, build, inputs, randomize

MAXIMUM = 1e-5  # float32, max difference of logits (reliability I23)


class Prefix(SidePath):
    """Keys and values of P virtual tokens before those of the text."""

    def __init__(self, heads: int, size: int, count: int = 2) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(heads, count, size))
        self.value = nn.Parameter(torch.randn(heads, count, size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Any:
        count = self.key.shape[1]
        key, value = (torch.cat([own.expand(key.shape[0], -1, -1, -1), t], dim=2) for own, t in ((self.key, key), (self.value, value)))
        mask = None if mask is None else F.pad(mask, (count, 0), value=True)
        return key, value, mask, None if bias is None else F.pad(bias, (count, 0))


@dataclass(frozen=True, kw_only=True)
class ToyPrefix(Method):
    identity_at_start = False

    def plan(self, model: nn.Module) -> Placement:
        return Placement([Site(path, model.get_submodule(path)) for path in facts(model).require("attention_modules")])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        config: Any = model.config
        heads = {"llama": 2, "qwen2": 2}.get(config.model_type, 4)
        return Prefix(heads, 8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prefix_equals_the_same_keys_and_values_in_the_cache(family: str, implementation: str) -> None:
    from transformers import DynamicCache

    model, ids = build(family), inputs(family)["input_ids"]
    model.set_attn_implementation(implementation)
    cache = DynamicCache()
    adapter = byway.attach(model, ToyPrefix(modules_to_save="none"))
    assert model.config._attn_implementation == f"byway_{implementation}"
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    found = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(2, 9)[None].expand(2, -1), use_cache=False).logits
    for index, (_, side) in enumerate(adapter.side_paths()):
        assert isinstance(side, Prefix)
        cache.update(side.key.detach().expand(2, -1, -1, -1), side.value.detach().expand(2, -1, -1, -1), index)
    byway.detach(model)
    assert model.config._attn_implementation == implementation
    wide = torch.cat([torch.ones(2, 2, dtype=torch.long), mask], dim=1)
    expected = model(input_ids=ids, attention_mask=wide, past_key_values=cache).logits
    real = mask.bool()
    assert (found[real] - expected[real]).abs().max() < MAXIMUM


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "roberta", "t5"])
def test_every_prefix_gets_a_gradient_also_under_checkpointing(family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = byway.attach(model, ToyPrefix(modules_to_save="none"))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    model(**x).logits.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapter.named_parameters())


def test_cached_generation_with_a_prefix_equals_uncached() -> None:
    for family in DECODERS:
        model = build(family)
        byway.attach(model, ToyPrefix())
        ids = inputs(family)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def documents(lengths: tuple[int, ...] = (5, 3, 6, 1)) -> tuple[list[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(5)
    docs = [torch.randint(3, VOCABULARY, (1, n), generator=g) for n in lengths]
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return docs, {"input_ids": torch.cat(docs, 1), "position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*DECODERS, "bert_mlm"])
def test_packed_documents_equal_documents_alone_and_do_not_see_each_other(family: str, implementation: str) -> None:
    from tests.tiny import bert_mlm

    torch.manual_seed(0)
    model = bert_mlm().eval() if family == "bert_mlm" else build(family)
    model.set_attn_implementation(implementation)
    docs, batch = documents()
    alone = torch.cat([model(input_ids=doc).logits for doc in docs], dim=1)
    for options in ({}, {"use_cache": True}) if family in DECODERS else ({},):
        with packing(model), packed():
            together = model(**batch, **options).logits
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            changed["input_ids"][0, :5] = 7
            after = model(**changed, **options).logits
        assert (together - alone).abs().max() < MAXIMUM
        assert torch.equal(after[:, 5:], together[:, 5:])
        assert not torch.equal(after[:, :5], together[:, :5])
    assert model.config._attn_implementation == implementation


def test_packed_documents_keep_a_sliding_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=4, **sizes)).eval()
    docs, batch = documents((9, 3, 11))
    alone = torch.cat([model(input_ids=doc, use_cache=False).logits for doc in docs], dim=1)
    with packing(model), packed():
        assert (model(**batch, use_cache=False).logits - alone).abs().max() < MAXIMUM


def test_documents_that_fit_into_the_window_need_no_mask_and_do_not_depend_on_others_that_do_not() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=8, **sizes)).eval()
    masks: list[Any] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )

    def together(lengths: tuple[int, ...]) -> Tensor:
        docs, batch = documents(lengths)
        alone = torch.cat([model(input_ids=doc, use_cache=False).logits for doc in docs], dim=1)
        with packing(model), packed(max(lengths)):
            logits = model(**batch, use_cache=False).logits
        assert (logits - alone).abs().max() < MAXIMUM
        return logits

    within = together((7, 3, 5))
    assert masks[-1] is None
    beyond = together((7, 3, 12))
    assert masks[-1] is not None
    assert torch.equal(within[:, :10], beyond[:, :10])


def test_packed_documents_each_have_the_prefix() -> None:
    model = build("llama")
    adapter = byway.attach(model, ToyPrefix())
    randomize(adapter.named_parameters(), scale=1.0)
    docs, batch = documents()
    alone = torch.cat([model(input_ids=doc, use_cache=False).logits for doc in docs], dim=1)
    with packing(model), packed():
        assert (model(**batch, use_cache=False).logits - alone).abs().max() < MAXIMUM


def test_choosing_another_implementation_after_attach_is_an_error_and_detach_still_works() -> None:
    model, x = build("llama"), inputs("llama")
    byway.attach(model, ToyPrefix())
    model.set_attn_implementation("eager")
    with pytest.raises(byway.AdapterError, match="set_attn_implementation"):
        model(**x)
    byway.detach(model)
    assert model.config._attn_implementation == "eager"
    model(**x)


def test_a_model_outside_the_registry_is_refused_before_it_is_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(byway.AdapterError, match="does not go through"), packing(model):
        pass
