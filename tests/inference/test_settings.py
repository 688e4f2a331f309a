"""Answers depend on what the user asks for and on the model's structure, not on settings that lie in the base's files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from byway.cli import main
from byway.errors import ConfigError
from byway.inference.generate import generate_text
from byway.inference.settings import UntilStop, left_aside, structure
from tests.inference.test_generate import PROMPTS, greedy
from tests.workshop.conftest import chat_tokenizer, llama

LEFTOVERS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"min_length": 40},
    {"min_new_tokens": 9},
    {"max_length": 3},
    {"max_new_tokens": 1},
    {"max_time": 1e-6},
    {"forced_eos_token_id": 5},
    {"typical_p": 0.2, "min_p": 0.9, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "do_sample": True},
    {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.1},
    {"num_return_sequences": 2, "num_beams": 4, "length_penalty": 5.0, "early_stopping": True},
    {"stop_strings": ["a", "the"]},
    {"repetition_penalty": 9.0, "encoder_repetition_penalty": 3.0},
    {"suppress_tokens": list(range(40, 200)), "begin_suppress_tokens": list(range(100))},
    {"bad_words_ids": [[number] for number in range(50, 120)]},
    {"sequence_bias": [[[77], 90.0]]},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"guidance_scale": 3.0},
    {"forced_bos_token_id": 3, "renormalize_logits": True, "remove_invalid_values": True},
    {"output_scores": True, "return_dict_in_generate": True, "output_attentions": True},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
]


def with_settings(model: Any, settings: dict[str, Any]) -> Any:
    """Set them as a file would, unchecked."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("settings", LEFTOVERS, ids=lambda settings: next(iter(settings)))
def test_settings_of_the_base_change_no_answer(settings: dict[str, Any], seed: int) -> None:
    model, tokenizer = llama(), chat_tokenizer(None)
    for options in ({}, {"temperature": 0.7, "seed": 3}):
        wanted = generate_text(llama_like(model), tokenizer, PROMPTS[:3], max_new_tokens=8, **options)
        own = with_settings(llama_like(model), settings)
        before = own.generation_config
        assert generate_text(own, tokenizer, PROMPTS[:3], max_new_tokens=8, **options) == wanted
        assert own.generation_config is before and all(getattr(before, name) == value for name, value in settings.items())
        said = left_aside(own)
        assert all(name in said for name in settings if name != "use_cache")


def llama_like(model: Any) -> Any:
    """A copy with generation settings of its own."""
    twin = llama()
    twin.load_state_dict(model.state_dict())
    return twin


def test_the_note_says_what_applies_and_what_does_not(seed: int) -> None:
    model = llama()
    assert left_aside(model) == "" and set(structure(model)) == {"eos_token_id", "pad_token_id"}
    with_settings(model, {"temperature": 0.6, "repetition_penalty": 1.1})
    said = "generation settings of the base that are not applied: temperature 0.6, repetition_penalty 1.1 (applied: "
    assert left_aside(model).startswith(said) and "eos_token_id" in left_aside(model)


SIZES: dict[str, Any] = {
    "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "init_std": 0.5, "pad_token_id": 0, "bos_token_id": 3,
    "eos_token_id": 2, "scale_embedding": False,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES, decoder_start_token_id=2)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SIZES, decoder_start_token_id=7)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES, decoder_start_token_id=0, decoder_vocab_size=300)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=2)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_decoders_keep_their_start_and_forced_first_token_and_nothing_else(family: str, seed: int) -> None:
    model, tokenizer = FAMILIES[family]().eval(), chat_tokenizer(None)
    kept: dict[str, Any] = {"forced_bos_token_id": 65} if family in ("bart", "mbart") else {}
    kept |= {"bad_words_ids": [[0]]} if family == "marian" else {}
    left = {"no_repeat_ngram_size": 1, "min_length": 7, "num_beams": 3, "num_return_sequences": 3, "forced_eos_token_id": 2}
    with_settings(model, kept | left)
    found = generate_text(model, tokenizer, ["the cat"], max_new_tokens=6)
    out = [model.generation_config.decoder_start_token_id]
    ids = torch.tensor([tokenizer("the cat").input_ids])
    with torch.no_grad():
        while len(out) < 7:
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([out])).logits[0, -1]
            if family == "marian":
                logits[0] = -torch.inf
            token = 65 if kept.get("forced_bos_token_id") and len(out) == 1 else int(logits.argmax())
            if token == 2:
                break
            out.append(token)
    assert found == [tokenizer.decode(out[1:], skip_special_tokens=True)]
    assert all(name in structure(model) for name in ("decoder_start_token_id", *kept))
    assert "forced_eos_token_id" in left_aside(model) and "forced_bos" not in left_aside(model).partition("(")[0]


def test_answers_end_before_the_first_stop_string_in_a_batch_alone_and_streamed(seed: int) -> None:
    model, tokenizer = llama(), chat_tokenizer(None)
    whole = generate_text(model, tokenizer, PROMPTS, max_new_tokens=24, raw=True)
    stop = [text[9:12] for text in whole[:3] if text[9:12].isprintable()] or [whole[0][3]]
    assert stop

    def cut(text: str) -> str:
        return text[: min([text.find(each) for each in stop if each in text], default=len(text))]

    wanted = [cut(text) for text in whole]
    assert wanted != whole
    assert generate_text(model, tokenizer, PROMPTS, max_new_tokens=24, raw=True, stop=stop) == wanted
    for prompt, answer in zip(PROMPTS, wanted, strict=True):
        heard: list[str] = []
        assert generate_text(model, tokenizer, [prompt], max_new_tokens=24, raw=True, stop=stop, on_text=heard.append) == [answer]
        assert "".join(heard) == answer


def test_a_stop_string_ends_the_computation_too(seed: int) -> None:
    model, tokenizer = llama(), chat_tokenizer(None)
    ids = tokenizer("the cat").input_ids
    written = greedy(model, ids, 24, set())
    stop = tokenizer.decode(written[2:4])
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate_text(model, tokenizer, ["the cat"], max_new_tokens=24, raw=True, stop=[stop])
    assert len(calls) <= 5


def test_a_stop_string_that_is_a_token_ends_at_the_token(seed: int) -> None:
    model, tokenizer = llama(), chat_tokenizer(None)
    token = greedy(model, tokenizer("the cat").input_ids, 4, set())[3]
    name = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_tokens([name])
    (answer,) = generate_text(model, tokenizer, ["the cat"], max_new_tokens=9, raw=True, stop=[name])
    ids = greedy(model, tokenizer("the cat").input_ids, 9, {token, 2})
    assert answer == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_could_begin_a_stop_string_is_held_back() -> None:
    for parts in (["ab", "c", "END", "x"], ["abcE", "N", "D"], ["abc", "EEND"], ["abcEN"], ["E", "N", "E", "ND"], []):
        heard: list[str] = []
        until = UntilStop(heard.append, ["END", "STOP"])
        for number, part in enumerate(parts):
            until(part, number == len(parts) - 1)
        assert "".join(heard) == "".join(parts).partition("END")[0]
    with pytest.raises(ConfigError, match="stop is"):
        generate_text(llama(), chat_tokenizer(), ["a"], stop=[""])


def test_commands_say_which_settings_do_not_apply(chat_base: Any, chat_adapter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = GenerationConfig.from_pretrained(chat_base)
    own.repetition_penalty, own.no_repeat_ngram_size = 1.3, 4
    own.save_pretrained(chat_base)
    arguments = ["generate", str(chat_adapter), "--base", str(chat_base), "-p", "the cat", "--max-new-tokens", "9"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "not applied: repetition_penalty 1.3, no_repeat_ngram_size 4" in printed.err
    assert main([*arguments, "--stop", printed.out[2:4]]) == 0
    assert capsys.readouterr().out == printed.out[: printed.out.index(printed.out[2:4])] + "\n"
