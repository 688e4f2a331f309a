"""A base is known again in another dtype, quantized, with a longer vocabulary, and told apart from another one."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import byway
from byway.base.fingerprint import ENTRIES, Fingerprint, compare, fingerprint
from byway.errors import AdapterError


def llama(seed: int = 0, **changes: int | float) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()  # pyright: ignore


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Every linear map but the head in 8 or 4 bits, by bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            if kind == "nf4":
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to("cpu"))
    return model


def test_it_survives_json():
    print_ = fingerprint(llama())
    assert Fingerprint.from_dict(json.loads(json.dumps(print_.to_dict(), allow_nan=False))) == print_
    with pytest.raises(AdapterError, match="malformed"):
        Fingerprint.from_dict({"matrices": {"a": [1]}, "architecture": {}, "tokenizer": None, "chat_template": None})


def test_entries_are_the_weights_own_values():
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    entries = fingerprint(model).matrices["model.layers.1.mlp.up_proj.weight"].entries
    assert len(entries) == ENTRIES and all(torch.any(weight[:32] == torch.tensor(entry)) for entry in entries)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_base_and_says_so(dtype):
    saved = fingerprint(llama())
    for one, other in ((saved, fingerprint(llama().to(dtype))), (fingerprint(llama().to(dtype)), saved)):
        verdict = compare(one, other)
        assert verdict.same and any(str(dtype).removeprefix("torch.") in note for note in verdict.notes)
    assert compare(saved, fingerprint(llama().to(dtype).float())).same


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_the_same_and_says_so(kind):
    small, plain = fingerprint(quantized(llama(), kind)), fingerprint(llama())
    for verdict in (compare(plain, small), compare(small, plain)):
        assert verdict.same and any("int8" in note or "4bit" in note for note in verdict.notes), verdict
    other = fingerprint(quantized(llama(1), kind))
    for verdict in (compare(plain, other), compare(other, plain), compare(small, other)):
        assert not verdict.same, verdict


def test_an_attached_model_has_the_fingerprint_of_the_bare_one():
    model = llama()
    before = fingerprint(model)
    byway.attach(model, byway.LoRA(targets=["q_proj"], modules_to_save=["lm_head"]))
    assert fingerprint(model) == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_the_same_base_and_says_so(tied):
    saved = fingerprint(llama(tie_word_embeddings=tied))
    model = llama(tie_word_embeddings=tied)
    model.resize_token_embeddings(101, mean_resizing=False)
    verdict = compare(saved, fingerprint(model))
    assert verdict.same and any("101 rows instead of 96" in note for note in verdict.notes)


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 2}, {"rms_norm_eps": 1e-3}, {"num_attention_heads": 8}])
def test_another_architecture_is_named(changes):
    verdict = compare(fingerprint(llama()), fingerprint(llama(**changes)))
    assert not verdict.same and any(next(iter(changes)) in difference for difference in verdict.differences)


def test_one_changed_layer_is_another_base():
    model = llama()
    saved = fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.02)
    verdict = compare(saved, fingerprint(model))
    assert not verdict.same and "model.layers.2.mlp.down_proj.weight" in verdict.differences[0]


def test_other_weights_are_another_base():
    verdict = compare(fingerprint(llama()), fingerprint(llama(1)))
    assert not verdict.same and "weights of 23 of 23 matrices differ" in verdict.differences[0]


def test_dropout_and_labels_are_not_architecture():
    torch.manual_seed(0)
    one = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50))
    saved = fingerprint(one)
    one.config.hidden_dropout_prob, one.config.id2label, one.config.use_cache = 0.3, {0: "a", 1: "b", 2: "c"}, False
    assert compare(saved, fingerprint(one)) == compare(saved, saved)


def test_any_module_has_one_and_its_depth_counts():
    def network(depth: int) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)), nn.Conv2d(2, 3, 3))

    saved = fingerprint(network(2))
    assert saved.architecture == {} and len(saved.matrices) == 3
    assert compare(saved, fingerprint(network(2))).same
    assert not compare(saved, fingerprint(network(3))).same
    assert not compare(fingerprint(network(3)), saved).same
    assert not compare(saved, fingerprint(nn.Embedding(4, 4))).same


def tokenizer(words: str, template: str | None) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    made.chat_template = template
    return made


def test_another_tokenizer_or_template_is_a_note():
    model = nn.Linear(2, 2)
    saved = fingerprint(model, tokenizer("? the fox", "{{ a }}"))
    assert compare(saved, fingerprint(model, tokenizer("? the fox", "{{ a }}"))).notes == ()
    other = compare(saved, fingerprint(model, tokenizer("? fox the", "{{ b }}")))
    assert other.same and len(other.notes) == 2
    assert "template" in compare(saved, fingerprint(model, tokenizer("? the fox", None))).notes[0]
    assert compare(saved, fingerprint(model)).notes == (), "no tokenizer here: nothing to say"


def test_it_is_quick_on_a_model_with_many_matrices():
    with torch.device("meta"):
        big = LlamaForCausalLM(LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9))
    model = big.to_empty(device="cpu")
    start = time.process_time()
    assert len(fingerprint(model).matrices) > 200
    assert time.process_time() - start < 0.5


def t5() -> nn.Module:
    torch.manual_seed(2)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes))


def mamba() -> nn.Module:
    torch.manual_seed(3)
    return MambaForCausalLM(MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=64))


def gpt2() -> nn.Module:
    torch.manual_seed(4)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def bert() -> nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
    return BertForMaskedLM(BertConfig(**sizes))


FAMILIES: list[Callable[[], nn.Module]] = [llama, gpt2, bert, t5, mamba]


@pytest.mark.parametrize("base", FAMILIES, ids=lambda base: base.__name__)
def test_a_single_redrawn_tensor_of_any_shape_is_another_base(base):
    model = base()
    saved = fingerprint(model)
    unseen = []
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            nn.init.normal_(parameter, std=0.1)
            if compare(saved, fingerprint(model)).same:
                unseen.append(name)
            parameter.copy_(kept)
    assert unseen == [] and compare(saved, fingerprint(model)).same


@pytest.mark.parametrize("base", FAMILIES, ids=lambda base: base.__name__)
def test_vectors_survive_what_matrices_survive(base):
    """Rounded once or twice, in any order, and read in any dtype; with a longer vocabulary."""
    plain = base()
    for name, parameter in plain.named_parameters():  # trained values: neither all ones nor all zeros
        if parameter.ndim < 2:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    half, brain, wide = torch.float16, torch.bfloat16, torch.float32
    kinds = [(wide,), (half,), (brain,), (half, wide), (brain, wide), (half, brain), (half, brain, wide)]
    prints = {}
    for steps in kinds:
        model = copy.deepcopy(plain)
        for dtype in steps:
            model = model.to(dtype)
        prints[steps] = fingerprint(model)
    for (one, a), (other, b) in itertools.permutations(prints.items(), 2):
        assert compare(a, b).same, (one, other, compare(a, b).differences)
    grown = copy.deepcopy(plain)
    grown.resize_token_embeddings(71, mean_resizing=False)  # pyright: ignore
    assert compare(prints[wide,], fingerprint(grown)).same


@pytest.mark.parametrize("method", [byway.BitFit(), byway.LayerNormTuning()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_with_merged_vectors_is_another_base(method, dtype):
    model = bert().to(dtype)
    saved = fingerprint(model)
    adapter = byway.attach(model, method)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    byway.merge(model)
    verdict = compare(saved, fingerprint(model))
    assert not verdict.same and "vectors differ" in " ".join(verdict.differences)


def test_constant_vectors_of_a_float32_base_are_not_taken_for_rounded_ones():
    model = llama()
    saved = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight.add_(1e-3)  # ones, which bfloat16 holds exactly, as it does the rounded 1.001
    verdict = compare(saved, fingerprint(model))
    assert not verdict.same and "model.norm.weight" in verdict.differences[0]


def test_small_changes_of_many_vectors_are_more_than_rounding():
    model = llama().to(torch.bfloat16).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    saved = fingerprint(model.to(torch.bfloat16))
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.003 * torch.randn_like(parameter).sign())
    verdict = compare(saved, fingerprint(model))
    assert not verdict.same and "rounding" in verdict.differences[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_vectors_of_a_quantized_base_are_compared(kind):
    small, plain = quantized(llama(), kind), fingerprint(llama())
    with torch.no_grad():
        small.model.norm.weight.add_(0.1)  # pyright: ignore
    verdict = compare(plain, fingerprint(small))
    assert not verdict.same and "model.norm.weight" in verdict.differences[0]


def test_a_bias_that_a_map_did_not_have_is_named():
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(8, 8, bias=False))
    saved = fingerprint(bare)
    bare[0].bias = nn.Parameter(torch.ones(8))
    assert "it has in addition 0.bias" in compare(saved, fingerprint(bare)).differences
    assert "it lacks 0.bias" in compare(fingerprint(bare), saved).differences


def test_a_record_of_an_earlier_version_is_compared_by_its_matrices():
    model = llama()
    record = fingerprint(model).to_dict()
    del record["vectors"]
    saved = Fingerprint.from_dict(record)
    assert compare(saved, fingerprint(model)).same
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
        assert compare(saved, fingerprint(model)).same
        model.lm_head.weight.add_(0.1)
    assert not compare(saved, fingerprint(model)).same
