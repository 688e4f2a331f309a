"""Tokenizer and configuration name one padding token, however they disagree in the files, so heads read the last real token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from byway.base import load_base
from byway.base.padding import agree, text_config

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = [f"w{i}" for i in range(60)]
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9", "w4 </s> w8 w0", "w11 w12"]


def tokenizer(directory: Path, pad: str | None, *, eos: str | None = "</s>", added: tuple[str, ...] = (), side: str = "right") -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS, *added])}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token=eos, pad_token=pad, unk_token="<unk>", padding_side=side
    )
    fast.save_pretrained(directory)


def base(directory: Path, family: str, pad: int | None) -> Path:
    """A tiny decoder of 64 tokens whose config.json says `pad`, whatever transformers thinks of that."""
    torch.manual_seed(7)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)
        transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes, **ids)).save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": pad}))
    return directory


def logits(model: Any, own: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model(**own(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("named", "stated", "expected"),
    [
        (None, None, 2),  # neither has one: the end token
        ("</s>", None, 2),
        ("</s>", 0, 2),  # they disagree: the tokenizer pads
        ("<pad>", 0, 3),
        (None, 0, 0),
        (None, 40, 2),  # an ordinary word is no padding
        (None, -1, 2),  # old Llama files
        ("<pad>", 64, 3),  # outside the vocabulary
        ("far", None, 2),  # a token that was added to the tokenizer only
    ],
)
def test_a_decoder_classifier_reads_the_last_real_token(tmp_path: Path, family: str, named, stated, expected: int) -> None:
    directory = base(tmp_path / "base", family, stated)
    tokenizer(directory, named, added=("near", "far") if named == "far" else ())
    model, own = load_base(directory, task="classification", num_labels=3, device_map="cpu")
    assert own.pad_token_id == model.config.pad_token_id == expected
    alone = torch.cat([logits(model, own, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, own, TEXTS), alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for text, found in zip(TEXTS, alone, strict=True):  # the head on the state of the last word, by hand
            states = model.base_model(**own(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
            torch.testing.assert_close(model.score(states)[0, -1], found, rtol=1e-4, atol=1e-5)


def test_a_conflict_is_told_and_a_missing_entry_is_not(tmp_path: Path, capsys) -> None:
    directory = base(tmp_path / "base", "llama", 0)
    tokenizer(directory, "</s>")
    load_base(directory, device_map="cpu")
    assert "pads with token 2, its config.json with 0, of 64 tokens: both use 2 now" in capsys.readouterr().err
    tokenizer(directory, None)
    model, own = load_base(directory, device_map="cpu")
    assert own.pad_token_id == model.config.pad_token_id == 0 and not capsys.readouterr().err


def test_left_padding_and_a_tokenizer_without_any_special_token(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", "llama", None)
    tokenizer(directory, None, side="left")
    model, own = load_base(directory, task="classification", num_labels=2, device_map="cpu")
    alone = torch.cat([logits(model, own, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, own, TEXTS), alone, rtol=1e-4, atol=1e-5)  # rotary positions are relative
    own.pad_token = own.eos_token = own.bos_token = own.unk_token = None
    model.config.pad_token_id = None
    agree(model, own)
    assert own.pad_token_id == model.config.pad_token_id == 0


def test_the_generation_settings_follow(tmp_path: Path) -> None:
    directory = base(tmp_path / "base", "llama", 0)
    (directory / "generation_config.json").write_text(json.dumps({"pad_token_id": 5, "eos_token_id": 2}))
    tokenizer(directory, "</s>")
    model, _ = load_base(directory, device_map="cpu")
    assert model.generation_config is not None and model.generation_config.pad_token_id == 2


def test_a_model_whose_positions_follow_from_its_padding_id_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    wanted = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=64, pad_token_id=1, **sizes)).eval()
    wanted.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base", "<pad>")
    model, own = load_base(tmp_path / "base", device_map="cpu")
    assert model.config.pad_token_id == own.pad_token_id == 1
    alone = torch.cat([logits(wanted, own, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, own, TEXTS), alone, rtol=1e-4, atol=1e-5)


def test_the_text_model_of_a_composite_is_the_one_that_is_told(tmp_path: Path) -> None:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=text | {"num_key_value_heads": 2, "pad_token_id": 0}, vision_config=vision, num_labels=2)
    tokenizer(tmp_path, "</s>")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.Gemma3ForSequenceClassification(config).eval()
    agree(model, own)
    told = text_config(model.config)
    assert told is not None and told is model.config.text_config and told.pad_token_id == 2
    alone = torch.cat([logits(model, own, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, own, TEXTS), alone, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_an_encoder_decoder_reads_the_tokenizers_end_token(tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.BartConfig(vocab_size=64, **sizes, **heads, pad_token_id=3, eos_token_id=50, bos_token_id=1)
    transformers.BartForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base", "<pad>")
    model, own = load_base(tmp_path / "base", device_map="cpu")
    texts = [f"{text} </s>" for text in ("w1 w2", "w3 w4 w5")]
    alone = torch.cat([logits(model, own, [text]) for text in texts])
    torch.testing.assert_close(logits(model, own, texts), alone, rtol=1e-4, atol=1e-5)
