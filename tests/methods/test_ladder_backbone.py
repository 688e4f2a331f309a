"""What must never happen to the backbone of a ladder, and what a ladder refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    StaticCache,
)

import byway
from byway.core.families import facts
from byway.core.slots import base_modules
from byway.errors import AdapterError, ConfigError, TargetError
from byway.methods.ladder_side_tuning import LadderSideTuning
from tests import unlisted, zoo
from tests.methods.ladders import attached, ladders
from tests.tiny import FAMILIES, build, inputs, randomize


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
    attached(model)
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
    attached(model)
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


def test_the_caches_hold_side_layers_behind_those_of_the_backbone() -> None:
    model = build("t5")
    attached(model, reduction=4, keep=[1, 2])
    x = inputs("t5") | {"use_cache": True}
    cache = model(**x).past_key_values
    for part, length in ((cache.self_attention_cache, 5), (cache.cross_attention_cache, 7)):
        assert [tuple(layer.keys.shape) for layer in part.layers] == [(2, 4, length, 8)] * 3 + [(2, 4, length, 2)] * 2


def test_caches_that_cannot_grow_or_are_out_of_step_are_refused() -> None:
    model = build("llama")
    attached(model)
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
    attached(model)
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
    attached(model)
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
    ladder = attached(model)
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
    attached(model)
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
    attached(model)
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
    attached(model)
    out = model(**inputs(family))
    assert torch.equal(out.pooler_output, model.pooler(out.last_hidden_state))


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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reduction": 0}, "reduction is 0"),
        ({"reduction": True}, "reduction is true"),
        ({"keep": [0], "drop": [1]}, "keep and drop are both given"),
        ({"init": "pruned"}, "init is 'pruned'"),
        ({"gate": "open"}, "gate is 'open'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"init": "x", "gate": "y"}, "(?s)init is 'x'.*gate is 'y'"),
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
        ({"drop": "0-"}, TargetError, "no layer of the decoder gets a side block"),
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


def test_switching_the_attention_afterwards_switches_the_side_blocks() -> None:
    model, x = build("llama"), inputs("llama")
    attached(model)
    out = model(**x).logits
    model.set_attn_implementation("eager")
    assert (model(**x).logits - out).abs().max() < 1e-5
    assert ladders(model)[0].config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["ernie", "cohere", "olmo2"])
def test_families_outside_the_table_get_side_blocks_of_their_own_class(name: str) -> None:
    model = unlisted.build(name) if name in unlisted.MODELS else zoo.build(name)
    wide = {n.partition("self_attn")[2]: p.numel() for n, p in model.named_parameters() if n.endswith("self_attn.q_proj.weight")}
    adapter = byway.attach(model, LadderSideTuning(reduction=2))
    assert any("side blocks start at random" in note for note in adapter.notes)
    given = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}
    model(**given)[0].sum().backward()
    assert all(p.grad is not None for _, p in adapter.named_parameters())
    narrow = {n.partition("self_attn")[2]: p.numel() for n, p in adapter.named_parameters() if n.endswith("self_attn.q_proj.weight")}
    assert {key: size // 4 for key, size in wide.items()} == narrow


@pytest.mark.parametrize("name", ["mixtral", "falcon", "gpt_bigcode", "phi3", "qwen3_moe", "clip"])
def test_families_whose_blocks_cannot_be_narrowed_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match="no side blocks are known"):
        byway.attach(zoo.build(name), LadderSideTuning(reduction=2))


def test_a_decoder_without_the_encoder_it_attends_to_is_refused() -> None:
    with pytest.raises(TargetError, match="MarianForCausalLM is a decoder without the encoder"):
        byway.attach(zoo.build("marian", "MarianForCausalLM"), LadderSideTuning(reduction=2))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("prompts", [byway.PromptTuning, byway.PTuning], ids=["prompt_tuning", "p_tuning"])
def test_virtual_tokens_and_a_ladder_are_refused_in_either_order(prompts: Any, family: str) -> None:
    model = build(family)
    byway.attach(model, byway.LadderSideTuning(reduction=4), "ladder")
    with pytest.raises(byway.TargetError, match="below the ladder 'ladder', which passes no gradient"):
        byway.attach(model, prompts(), "prompts")
    byway.detach(model, "ladder")
    byway.attach(model, prompts(), "prompts")
    with pytest.raises(byway.AdapterError, match=r"adapter 'prompts' is trained inside .*, below the ladder"):
        byway.attach(model, byway.LadderSideTuning(reduction=4), "ladder")
