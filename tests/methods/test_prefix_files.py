"""Prefix tuning's files, which are HF peft's where its format can hold them, and encoder-decoders, where peft computes something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import byway
from byway import PrefixTuning, PTuningV2
from byway.methods.prefix.method import PrefixMethod
from byway.methods.prefix.sides import PrefixedAttention
from tests import zoo
from tests.methods.prefixes import cache_of, direct, pairs, table_of
from tests.tiny import LAYERS, build, inputs, randomize
from tests.train.conftest import assert_same_run, build_recipe, interrupt_at, llama_dir, picture, quick_picture  # noqa: F401 - fixtures

FP64, FP32 = 1e-12, 1e-5  # largest difference of logits (reliability I23)


PEFT = {
    "llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "opt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM",
}  # fmt: skip


@pytest.mark.parametrize("family", PEFT)
def test_a_file_of_peft_gives_its_outputs_and_gradients_and_ours_is_read_by_peft(family: str, seed: int, tmp_path: Path) -> None:
    count = random.Random(seed).randint(1, 6)
    config = peft.PrefixTuningConfig(task_type=PEFT[family], num_virtual_tokens=count)
    theirs: Any = peft.get_peft_model(build(family), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    x = inputs(family, seed)
    x.pop("use_cache")
    mask = torch.ones_like(x["input_ids"])
    mask[0, -2:] = 0
    x["attention_mask"] = mask
    real = mask.bool() if family != "t5" else torch.ones(2, 5, dtype=torch.bool)
    expected = theirs(**x).logits[real]
    expected.pow(2).mean().backward()
    model: Any = build(family)
    adapter = byway.load(model, tmp_path / "theirs", trainable=True)
    assert isinstance(adapter.method, PrefixTuning)
    found = model(**x).logits[real]
    found.pow(2).mean().backward()
    ((_, weight),) = adapter.named_parameters()
    grad = theirs.prompt_encoder["default"].embedding.weight.grad
    assert (found - expected).abs().max() < FP32
    assert weight.grad is not None and (weight.grad - grad).norm() < 1e-5 * grad.norm()
    adapter.save(tmp_path / "ours")
    back: Any = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours")).eval()
    assert (back(**x).logits[real] - expected).abs().max() < FP32
    assert torch.equal(
        back.generate(input_ids=x["input_ids"], max_new_tokens=5, do_sample=False),
        model.generate(x["input_ids"], max_new_tokens=5, do_sample=False),
    )


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt_bigcode", "gpt_neox", "qwen3", "bart", "marian"])
def test_other_families_agree_with_peft_too(name: str, tmp_path: Path) -> None:
    task = "SEQ_2_SEQ_LM" if name in ("bart", "marian") else "CAUSAL_LM"
    theirs: Any = peft.get_peft_model(zoo.build(name), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = zoo.build(name)
    x = zoo.inputs(model)
    byway.load(model, tmp_path / "theirs")
    assert (model(**x).logits - theirs(**x).logits).abs().max() < FP32


def test_a_folded_mlp_is_read_by_peft(tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, PrefixTuning(num_virtual_tokens=3, hidden_size=8))
    randomize(adapter.named_parameters())
    out = model(**x).logits
    adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "ours")).eval()
    x.pop("use_cache")
    assert (theirs(**x).logits - out).abs().max() < FP32
    assert any("inner" in key for key in adapter.state_dict())


def test_an_encoder_decoder_has_three_prefixes_each_with_its_own_numbers(tmp_path: Path) -> None:
    model, x = build("t5"), inputs("t5")
    adapter = byway.attach(model, direct())
    assert sum(isinstance(side, PrefixedAttention) for _, side in adapter.side_paths()) == 3 * LAYERS
    assert "Byway's own format" in adapter.notes[0]
    model(**x).logits.pow(2).mean().backward()
    for _, parameter in adapter.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).all()
    adapter.save(tmp_path / "three")
    assert (tmp_path / "three" / "byway_adapter.json").exists()
    byway.detach(model)
    counts = []
    for chosen in ("encoder", ["decoder"], ["decoder", "cross"]):
        counts.append(byway.attach(model, direct(attentions=chosen)).num_parameters)
        byway.detach(model)
    assert counts == [3 * 2 * LAYERS * 32 * n for n in (1, 1, 2)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", ["none", "earlier"])
def test_t5_s_distances_count_the_prefix_only_if_asked_to(bias: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    model, x = build("t5").double(), inputs("t5")
    model.set_attn_implementation(implementation)
    adapter = byway.attach(model, direct(attentions="decoder", relative_bias=bias))
    randomize(adapter.named_parameters(), scale=1.0)
    found = model(**x).logits
    weight = table_of(adapter, "decoder").weight.detach()
    byway.detach(model)
    if bias == "none":
        plain = T5Attention.compute_bias

        def without(self: Any, *args: Any, **options: Any) -> Tensor:
            found = plain(self, *args, **options)
            return torch.cat([torch.zeros_like(found[..., :3]), found[..., 3:]], -1) if options.get("past_seen_tokens") else found

        monkeypatch.setattr(T5Attention, "compute_bias", without)
    cache = EncoderDecoderCache(cache_of(pairs(weight, LAYERS, 4), 2), DynamicCache())
    expected = model(**{**x, "use_cache": True}, past_key_values=cache).logits
    assert (found - expected).abs().max() < FP64


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("bias", ["none", "earlier"])
def test_an_encoder_decoder_generates_the_same_with_and_without_a_cache(family: str, bias: Any) -> None:
    model: Any = build("t5") if family == "t5" else zoo.build(family)
    adapter = byway.attach(model, direct(relative_bias=bias))
    randomize(adapter.named_parameters(), scale=1.0)
    ids = inputs("t5")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    for beams in (1, 3):
        options: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": 7,
            "do_sample": False,
            "num_beams": beams,
            "eos_token_id": None,
        }
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_a_recipe_trains_saves_resumes_and_generates(llama_dir: Path, tmp_path: Path, quick_picture: None) -> None:  # noqa: F811
    from byway.train import Stopped, train

    method = {"name": "prefix_tuning", "num_virtual_tokens": 3, "hidden_size": 8, "dropout": 0.1, "init_text": "w1 w2"}
    recipe = build_recipe(llama_dir, tmp_path, method=method)
    recipe["method"] = method
    whole: Any = train(recipe)
    assert whole.metrics["step"] == 6
    pieces = recipe | {"output": str(tmp_path / "pieces")}
    with pytest.raises(Stopped):
        train(pieces, on_event=interrupt_at(3))
    assert_same_run(whole.directory, train(pieces, resume=True).directory)
    loaded: Any = byway.load_base(str(llama_dir), dtype="fp32")
    model, tokenizer = loaded
    byway.load(model, tmp_path / "run" / "adapter")
    assert tokenizer is not None
    ids = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3


@pytest.mark.parametrize("method", [PrefixTuning(num_virtual_tokens=4), PTuningV2(num_virtual_tokens=4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("family", "changes", "hidden"),
    [
        ("mistral", {"sliding_window": 5}, True),
        ("mistral", {"sliding_window": 64}, False),  # as long as the longest text
        ("mistral", {"sliding_window": None}, False),
        ("gemma2", {"sliding_window": 5}, True),  # in every other layer
        ("qwen2", {"sliding_window": 5, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, True),
        ("phi3", {"sliding_window": 5}, True),
    ],
)
def test_a_window_that_can_hide_the_prefix_is_not_written_for_peft(
    family: str, changes: dict[str, Any], hidden: bool, method: PrefixMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.MODELS, family, (*zoo.MODELS[family][:2], {**zoo.MODELS[family][2], **changes}))
    model = zoo.build(family)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    adapter = byway.attach(model, method)
    randomize(adapter.named_parameters())
    expected = model(input_ids=ids).logits.detach()
    adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / "byway_adapter.json").exists() == hidden
    assert any("lets the attention window of 5 tokens hide the prefix" in note for note in adapter.notes) == hidden
    if not hidden:
        theirs = peft.PeftModel.from_pretrained(zoo.build(family), str(tmp_path / "a")).eval()
        assert (theirs(input_ids=ids).logits - expected).abs().max() < FP32
        return
    again = zoo.build(family)
    byway.load(again, tmp_path / "a")
    assert torch.equal(again(input_ids=ids).logits, expected)
    byway.detach(again)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(zoo.build(family), config).save_pretrained(tmp_path / "theirs")
    assert any("HF peft computes something else" in note for note in byway.load(again, tmp_path / "theirs").notes)
