"""Prompt tuning against hand-built inputs_embeds and HF peft, in outputs, gradients and files; templates; wrong use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import byway
from byway.engine.loss.answers import answers
from byway.engine.loss.tokens import token_loss
from byway.errors import AdapterError, ConfigError, TargetError
from byway.methods.prompt_tuning import PromptTuning
from tests import zoo
from tests.tiny import VOCABULARY, build, inputs, randomize

MAXIMUM = 1e-5  # reliability I23
PEFT = ("llama", "gpt2", "t5", "opt", "qwen2")


class Words:
    """A tokenizer of one token a word, by length; nothing special is added."""

    def __call__(self, text: str, **options: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": [3 + len(word) for word in text.split()]})


def prompt(adapter: byway.Adapter) -> Any:
    return dict(adapter.named_parameters())[next(n for n, _ in adapter.named_parameters() if n.endswith("prompt_embeddings"))]


def attached(model: Any, **fields: Any) -> byway.Adapter:
    adapter = byway.attach(model, PromptTuning(**{"num_virtual_tokens": None if "template" in fields else 4} | fields), tokenizer=Words())
    randomize(adapter.named_parameters())
    return adapter


def by_hand(family: str, model: Any, x: dict[str, Any], vectors: Tensor) -> Tensor:
    """The bare base on [P_e ; E(x)], with the logits of the virtual tokens cut off."""
    embeds = model.get_input_embeddings()(x["input_ids"])
    rest = {k: v for k, v in x.items() if k != "input_ids"}
    joined = torch.cat([vectors[None].expand(len(embeds), -1, -1), embeds], 1)
    with byway.disabled(model):
        out = model(inputs_embeds=joined, **rest).logits
    return out if family == "t5" else out[:, len(vectors) :]


@pytest.mark.parametrize("family", PEFT)
def test_it_is_prepending_the_same_vectors_as_inputs_embeds(family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = attached(model)
    assert (model(**x).logits - by_hand(family, model, x, prompt(adapter))).abs().max() < MAXIMUM


def test_in_float64_it_is_exact() -> None:
    model, x = build("llama").double(), inputs("llama")
    adapter = attached(model)
    assert prompt(adapter).dtype == torch.float64
    assert (model(**x).logits - by_hand("llama", model, x, prompt(adapter))).abs().max() < 1e-12


@pytest.mark.parametrize("family", PEFT)
def test_outputs_and_gradients_are_those_of_peft(family: str, seed: int) -> None:
    count, rows, length = 2 + seed % 5, 1 + seed % 3, 5 + seed % 7
    model, x = build(family), inputs(family, rows=rows, length=length)
    ours = attached(model, num_virtual_tokens=count)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    theirs = peft.get_peft_model(build(family), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=count))
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data[:count] = prompt(ours).detach()
    x |= {"attention_mask": torch.ones_like(x["input_ids"])}
    out, reference = model(**x).logits, theirs(**x).logits
    reference = reference if family == "t5" else reference[:, count:]
    assert (out - reference).abs().max() < MAXIMUM
    for logits in (out, reference):
        logits.pow(2).mean().backward()
    assert (prompt(ours).grad - weight.grad[:count]).norm() < 1e-5 * weight.grad.norm()


@pytest.mark.parametrize("family", PEFT)
def test_peft_loads_what_we_write_and_we_load_what_peft_writes(family: str, tmp_path: Path) -> None:
    model, x = build(family), inputs(family) | {"attention_mask": torch.ones_like(inputs(family)["input_ids"])}
    attached(model).save(tmp_path / "ours")
    expected = model(**x).logits
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    found = theirs(**x).logits
    assert ((found if family == "t5" else found[:, 4:]) - expected).abs().max() < MAXIMUM
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    fresh = peft.get_peft_model(build(family), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    fresh.save_pretrained(tmp_path / "theirs")
    expected = fresh(**x).logits
    other = build(family)
    byway.load(other, tmp_path / "theirs")
    assert (other(**x).logits - (expected if family == "t5" else expected[:, 3:])).abs().max() < MAXIMUM


def test_a_classifier_of_peft_pools_as_peft_does_and_ours_pools_its_cls(tmp_path: Path) -> None:
    x = inputs("bert") | {"attention_mask": torch.ones(2, 7, dtype=torch.long), "token_type_ids": torch.ones(2, 7, dtype=torch.long)}
    fresh = peft.get_peft_model(build("bert"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    fresh.save_pretrained(tmp_path / "theirs")
    model = build("bert")
    loaded = byway.load(model, tmp_path / "theirs")
    assert isinstance(loaded.method, PromptTuning) and loaded.method.placement == "first"
    assert (model(**x).logits - fresh(**x).logits).abs().max() < MAXIMUM
    loaded.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "again")
    assert (again(**x).logits - fresh(**x).logits).abs().max() < MAXIMUM

    model = build("bert")
    adapter = attached(model)
    words = model.get_input_embeddings()(x["input_ids"])
    joined = torch.cat([words[:, :1], prompt(adapter)[None].expand(2, -1, -1), words[:, 1:]], 1)
    types = torch.cat([torch.ones(2, 1), torch.zeros(2, 4), torch.ones(2, 6)], 1).long()
    with byway.disabled(model):
        pooled = model.bert(inputs_embeds=joined, token_type_ids=types).pooler_output
    head = next(side for site, side in adapter.side_paths() if site.path == "classifier").copy
    assert (model(**x).logits - head(pooled)).abs().max() < MAXIMUM
    adapter.save(tmp_path / "native")
    assert (tmp_path / "native" / "byway_adapter.json").exists()
    assert any("own format" in note for note in adapter.notes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "roberta", "t5"])
def test_padding_on_either_side_gives_the_same_without_saying_positions(family: str) -> None:
    model = zoo.build(family) if family in ("bert", "roberta") else build(family)  # those that do not pool a padded column
    attached(model, template="<T1> {text} <T2>" if family in ("bert", "t5") else "<T*2> {text}")
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(2))
    pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    more = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}
    alone = model(input_ids=ids, **more).logits
    left = model(input_ids=torch.cat([pad, ids], 1), attention_mask=mask, **more).logits
    right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=mask.flip(1), **more).logits
    if left.shape != alone.shape:
        left, right = left[:, 3:], right[:, :6]
    assert (left - alone).abs().max() < MAXIMUM
    assert (right - alone).abs().max() < MAXIMUM


def test_a_users_positions_are_shifted_and_real_tokens_begin_at_p() -> None:
    model, x = build("gpt2"), inputs("gpt2")
    attached(model)
    seen: list[Tensor] = []
    model.transformer.wpe.register_forward_hook(lambda m, a, out: seen.append(a[0]))
    expected = model(**x).logits
    assert torch.equal(seen.pop()[0], torch.arange(11))
    assert torch.equal(model(**x, position_ids=torch.arange(7)[None].expand(2, -1)).logits, expected)
    model(**x, position_ids=torch.arange(5, 12)[None])
    assert torch.equal(seen[-1][0], torch.arange(5, 16))


# ---- outputs keep the base's length


def test_hidden_states_and_attentions_have_the_bases_length() -> None:
    for family in ("llama", "bert"):
        model, x = build(family), inputs(family)
        model.set_attn_implementation("eager")
        attached(model)
        out = model(**x, output_hidden_states=True, output_attentions=True)
        assert {h.shape[1] for h in out.hidden_states} == {7}
        assert {a.shape[2:] for a in out.attentions} == {(7, 7)}


def test_the_loss_of_a_model_called_with_labels_is_over_the_bases_tokens() -> None:
    model, x = build("llama"), inputs("llama")
    attached(model)
    labels = x["input_ids"].clone()
    labels[:, :3] = -100
    out = model(**x, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), labels[:, 3:].flatten())
    assert torch.isclose(out.loss, expected)


# ---- templates


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_template_around_the_question_is_what_inputs_embeds_say_in_training_and_in_generation(family: str) -> None:
    model = build(family)
    adapter = attached(model, template="<T1> on {text} go <T2> <T1>")
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[:, :5] = -100
    e, v = model.get_input_embeddings(), prompt(adapter)
    word = e(torch.tensor([5]))
    parts = [v[:1], word, e(ids[0, :5]), word, v[1:], v[:1], e(ids[0, 5:])]
    with byway.disabled(model):
        whole = model(inputs_embeds=torch.cat(parts)[None]).logits[0]  # 2 leading, 5 text, 3 trailing, 4 answer
    expected = torch.cat([whole[2:6], whole[9:14]])  # the last token of the question is read after the template
    out = model(input_ids=ids, labels=labels, use_cache=False)
    assert (out.logits[0] - expected).abs().max() < MAXIMUM
    with answers(labels):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, out.logits)
    total, count = token_loss(model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}, labels_only=True)
    assert torch.isclose(total / count, out.loss, atol=1e-5)
    # generation: prefill is the question, and each answer token sees what training saw
    cached = model(input_ids=ids[:, :5], use_cache=True)
    steps = [cached.logits[0, -1]]
    for i in range(5, 9):
        cached = model(input_ids=ids[:, i : i + 1], past_key_values=cached.past_key_values)
        steps.append(cached.logits[0, -1])
    assert (torch.stack(steps) - expected[4:]).abs().max() < MAXIMUM
    assert_generates(model, ids[:, :5])


def assert_generates(model: Any, ids: Tensor) -> None:
    """Greedy with left padding in a batch is what each row gives alone."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    longer = torch.cat([ids, ids], 1)[:, : padded.shape[1]]
    both = model.generate(torch.cat([padded, longer]), attention_mask=torch.cat([mask, torch.ones_like(mask)]), **options)
    assert torch.equal(both[:1, padded.shape[1] :], alone)


def test_where_the_answer_begins_cannot_be_guessed() -> None:
    model, x = build("llama"), inputs("llama")
    attached(model, template="{text} <T>")
    with pytest.raises(AdapterError, match="where the answer begins"):
        model(**x)
    with pytest.raises(AdapterError, match="where the answer begins"):
        model.generate(x["input_ids"], use_cache=False, max_new_tokens=2)


def test_a_template_of_an_encoder_stands_between_cls_and_sep() -> None:
    model, x = build("bert"), inputs("bert")
    adapter = attached(model, template="<T> on {text} <T>")
    e, v = model.get_input_embeddings(), prompt(adapter)
    words = e(x["input_ids"])
    wide = lambda t: t[None].expand(2, -1, -1)  # noqa: E731
    joined = torch.cat([words[:, :1], wide(v[:1]), wide(e(torch.tensor([5]))), words[:, 1:-1], wide(v[1:]), words[:, -1:]], 1)
    with byway.disabled(model):
        pooled = model.bert(inputs_embeds=joined).pooler_output
    head = next(side for site, side in adapter.side_paths() if site.path == "classifier").copy
    assert (model(**x).logits - head(pooled)).abs().max() < MAXIMUM


def test_a_saved_template_needs_no_tokenizer(tmp_path: Path) -> None:
    model, x = build("bert"), inputs("bert")
    attached(model, template="<T> one two three {text} four <T>").save(tmp_path / "a")
    other = build("bert")
    byway.load(other, tmp_path / "a")
    assert torch.equal(other(**x).logits, model(**x).logits)
    with pytest.raises(ConfigError, match="tokenizer"):
        byway.attach(build("bert"), PromptTuning(template="<T> one {text}"))


def test_t5_sees_the_virtual_tokens_in_its_cross_attention_and_generates_with_beams() -> None:
    model = build("t5")
    adapter = attached(model, template="<T> {text} <T>")
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    e, v = model.get_input_embeddings(), prompt(adapter)
    row = torch.cat([v[:1], e(ids[0, :4]), v[1:], e(ids[0, 4:5])])[None]
    with byway.disabled(model):
        expected = model(inputs_embeds=row, decoder_input_ids=ids[:1, :3]).logits
    out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :3]).logits
    assert (out[:1] - expected).abs().max() < MAXIMUM
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


# ---- starts


def test_the_starts_are_what_they_say(seed: int) -> None:
    model = build("llama")
    table = model.get_input_embeddings().weight.detach()

    def start(**fields: Any) -> Tensor:
        adapter = byway.attach(model, PromptTuning(**fields), tokenizer=Words())
        found = prompt(adapter).detach().clone()
        byway.detach(model)
        return found

    assert torch.equal(start(init="text", text="a bb ccc", num_virtual_tokens=5), table[[4, 5, 6, 4, 5]])
    drawn = start(init="vocabulary", num_virtual_tokens=6, among=8)
    places = [int((table == row).all(1).nonzero()) for row in drawn]
    assert len(set(places)) == 6 and max(places) < 8
    named = start(init="labels", labels=["good", "very bad"], num_virtual_tokens=4)
    assert torch.allclose(named[:2], torch.stack([table[7], table[[7, 6]].mean(0)]))
    assert abs(float(start(num_virtual_tokens=90).std() / table.std()) - 1) < 0.1
    assert start().shape == (20, 32)


# ---- families and combinations


@pytest.mark.parametrize("name", ["gemma", "phi3", "gpt_neox", "bloom", "falcon", "mpt", "gptj", "qwen3_moe", "opt"])
def test_other_decoders_equal_inputs_embeds_and_generate_the_same_with_and_without_a_cache(name: str) -> None:
    model = zoo.build(name)
    adapter = attached(model)
    x = {"input_ids": zoo.inputs(model)["input_ids"], "use_cache": False}
    assert (model(**x).logits - by_hand("", model, x, prompt(adapter))).abs().max() < MAXIMUM
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(x["input_ids"])
    mask[0, :2] = 0
    cached = model.generate(x["input_ids"], attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(x["input_ids"], attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("name", ["electra", "albert", "distilbert", "deberta-v2", "modernbert", "mpnet", "bart", "mbart"])
def test_other_encoders_run_and_keep_their_length(name: str) -> None:
    model = zoo.build(name)
    x = zoo.inputs(model)
    bare = model(**x).logits
    adapter = attached(model)
    out = model(**x, attention_mask=torch.ones_like(x["input_ids"])).logits
    assert out.shape == bare.shape and not torch.equal(out, bare)
    assert (out - model(**x).logits).abs().max() < MAXIMUM
    out.pow(2).mean().backward()
    assert prompt(adapter).grad.abs().sum() > 0


def test_two_prompts_are_active_together_in_training_and_generation() -> None:
    model, x = build("llama"), inputs("llama")
    first = attached(model, num_virtual_tokens=2)
    second = byway.attach(model, PromptTuning(num_virtual_tokens=3), name="b")
    vectors = torch.cat([prompt(second), prompt(first)])
    assert (model(**x).logits - by_hand("llama", model, x, vectors)).abs().max() < MAXIMUM
    mask = torch.ones_like(x["input_ids"])
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(x["input_ids"], use_cache=True, **options), model.generate(x["input_ids"], use_cache=False, **options)
    )


# ---- wrong use


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"template": "<T> text"}, "0 times"),
        ({"template": "<T1> <T3> {text}"}, "without gaps"),
        ({"template": "<T> <T1> {text}"}, "do not go together"),
        ({"template": "words {text}"}, "no virtual token"),
        ({"template": "<Tx> <T> {text}"}, "<Tx> is not a virtual token"),
        ({"template": "<T> {text}", "num_virtual_tokens": 3}, "the template has 1"),
        ({"init": "text"}, "init: text needs the field text"),
        ({"init": "uniform", "placement": "last"}, "(?s)placement is 'last'.*init is 'uniform'"),
        ({"among": 0}, "among is 0"),
    ],
)
def test_wrong_fields_are_all_reported(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PromptTuning(**fields)


def test_what_cannot_hold_virtual_tokens_is_refused() -> None:
    for name in ("vit", "wav2vec2", "clip"):
        with pytest.raises(TargetError):
            byway.attach(zoo.build(name), PromptTuning())
    model, x = build("llama"), inputs("llama")
    attached(model)
    ids = x["input_ids"][:1]
    with pytest.raises(AdapterError, match="packed"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 3, 7]), use_cache=False)
    with pytest.raises(AdapterError, match="packed"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
    with pytest.raises(AdapterError, match="static"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with byway.disabled(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="holds no virtual"):
        model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 8, dtype=torch.long))
    bert = build("bert")
    attached(bert)
    with pytest.raises(AdapterError, match="do not fit"):
        bert(input_ids=torch.ones(1, 126, dtype=torch.long))


def _ids_too(kind: str) -> Any:
    """Tiny models that read more from token ids than their embeddings."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    if kind == "gemma4":  # a second embedding for each layer: it raises
        own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8, "num_kv_shared_layers": 0}
        return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes, **own))
    if kind == "gemma3n":  # the same, but without ids that part is left out in silence
        own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4, "num_kv_shared_layers": 0}
        model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**sizes, **own))
        for name, parameter in model.named_parameters():
            if name.endswith("correct_output_scale"):  # zero in a new model
                nn.init.ones_(parameter)
        return model
    # the scale of ESM's embeddings depends on the share of masked tokens
    small = {name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    return transformers.EsmForMaskedLM(transformers.EsmConfig(**small, pad_token_id=1, mask_token_id=4, token_dropout=True))


@pytest.mark.parametrize("method", [byway.PromptTuning(num_virtual_tokens=3), byway.PTuning(num_virtual_tokens=3)])
@pytest.mark.parametrize(("kind", "reason"), [("gemma4", "without their ids"), ("gemma3n", "something else"), ("esm", "something else")])
def test_a_model_that_needs_ids_beside_embeddings_is_refused_at_attach(method, kind, reason) -> None:
    torch.manual_seed(0)
    model = _ids_too(kind).train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(byway.TargetError, match=f"{reason}.*and virtual tokens have embeddings only"):
        byway.attach(model, method)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()} and model.training
    byway.attach(model, byway.LoRA())
