"""Where a prefix starts, what it goes with and what it refuses: words, zeros, a static cache, values out of range, other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import byway
from byway import LoRA, PrefixTuning
from tests import zoo
from tests.methods.prefixes import FP32, direct, table_of
from tests.tiny import build, inputs, randomize


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_gives_the_tokens_and_logits_of_a_growing_one(family: str, implementation: str, padded: bool) -> None:
    model: Any = build(family)
    model.set_attn_implementation(implementation)
    randomize(byway.attach(model, direct()).named_parameters(), scale=0.5)
    ids = inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    grows = model.generate(ids, return_dict_in_generate=True, **options)
    static = model.generate(ids, return_dict_in_generate=True, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static.sequences, grows.sequences)
    assert max((a - b).abs().max() for a, b in zip(static.logits, grows.logits, strict=True)) < FP32


class Words:
    """A tokenizer of which only the ids matter."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_prefix_from_words_is_those_words_in_front(family: str, hidden: int | None) -> None:
    model, x = build(family).train(), inputs(family)
    method = PrefixTuning(num_virtual_tokens=5, hidden_size=hidden, init_text="11 12 13")
    byway.attach(model, method, tokenizer=Words())
    assert all(module.training for module in model.modules())
    model.eval()
    found = model(**x).logits
    byway.detach(model)
    words = torch.tensor([[11, 12, 13, 11, 12]]).expand(2, -1)
    expected = model(input_ids=torch.cat([words, x["input_ids"]], dim=1), use_cache=False).logits[:, 5:]
    assert (found - expected).abs().max() < FP32


def test_a_prefix_from_words_is_taken_from_the_bare_base_and_is_read_without_a_tokenizer(tmp_path: Path) -> None:
    model, x = build("t5"), inputs("t5")
    method = PrefixTuning(num_virtual_tokens=4, hidden_size=None, init_text="11 12")
    alone = {k: v.clone() for k, v in byway.attach(model, method, tokenizer=Words()).state_dict().items()}
    byway.detach(model)
    randomize(byway.attach(model, LoRA(rank=2), name="lora").named_parameters(), scale=1.0)
    adapter = byway.attach(model, method, tokenizer=Words())
    assert all(torch.equal(value, alone[key]) for key, value in adapter.state_dict().items())
    byway.detach(model, "lora")
    out = model(**x).logits
    adapter.save(tmp_path / "words")
    other = build("t5")
    byway.load(other, tmp_path / "words")
    assert torch.equal(other(**x).logits, out)


def test_words_need_a_tokenizer_and_a_model_that_reads_text() -> None:
    method = PrefixTuning(init_text="11 12")
    with pytest.raises(byway.ConfigError, match="needs the base's tokenizer"):
        byway.attach(build("llama"), method)
    with pytest.raises(byway.ConfigError, match="reads pixel_values, not text"):
        byway.attach(build("vit"), method, tokenizer=Words())
    with pytest.raises(byway.ConfigError, match="more tokens than the base"):
        byway.attach(build("llama"), PrefixTuning(init_text="11 97"), tokenizer=Words())


@pytest.mark.parametrize("hidden", [None, 8])
def test_zero_starts_from_keys_and_values_of_zero_and_learns(hidden: int | None) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=2, hidden_size=hidden, init="zero"))
    assert not table_of(adapter, "decoder").whole().any()
    model(**x).logits.pow(2).mean().backward()
    assert any(p.grad is not None and p.grad.any() for _, p in adapter.named_parameters())


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if zoo.MODELS[name][0].startswith(("GPTJ", "Bloom", "Deberta"))])
def test_a_model_outside_the_registry_is_refused_untouched(name: str) -> None:
    model = zoo.build(name)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(byway.AdapterError, match="does not go through transformers' registry"):
        byway.attach(model, PrefixTuning())
    assert [p.requires_grad for p in model.parameters()] == before
    assert byway.adapters(model) == {}


def test_more_tokens_than_positions_are_refused_with_the_numbers() -> None:
    model = build("gpt2")
    byway.attach(model, PrefixTuning(num_virtual_tokens=8, hidden_size=None))
    ids = torch.full((1, 121), 5)
    with pytest.raises(byway.AdapterError, match=r"121 tokens after a prefix of 8 do not fit into the model's 128 learned positions"):
        model(input_ids=ids)
    model(input_ids=ids[:, :120])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "zeros"}, "init"),
        ({"init_text": " "}, "init_text"),
        ({"init_text": "a", "init": "zero"}, "do not go together"),
        ({"attentions": ()}, "attentions"),
        ({"relative_bias": "some"}, "relative_bias"),
        ({"pairs": "both"}, "pairs"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(byway.ConfigError, match=named):
        PrefixTuning(**options)


def test_attentions_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(byway.TargetError, match=r"no such attentions \(there are: cross, decoder, encoder\)\nhint: did you mean 'encoder'"):
        byway.attach(build("t5"), PrefixTuning(attentions="encodr"))


def test_a_merge_refused_at_the_root_names_the_model_itself() -> None:
    model = build("llama")
    byway.attach(model, direct())
    with pytest.raises(byway.NotMergeable, match=r"cannot be merged: the model itself: what it computes has no equal"):
        byway.merge(model)
