"""Tokenizer files of every broken kind are a ConfigError that names the base, for ``load_base`` and ``load_tokenizer`` alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from byway.base import load_base, load_tokenizer
from byway.base.blame import blaming
from byway.base.read_tokenizer import read_tokenizer
from byway.base.tokenizer import stored_tokenizer
from byway.errors import ConfigError
from tests.train.conftest import write_tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
Break = Callable[[Path], Any]


def settings(**changes: Any) -> Break:
    def write(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


def inside(**changes: Any) -> Break:
    """Change tokenizer.json."""

    def write(folder: Path) -> None:
        file = folder / "tokenizer.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | changes | {"model": found["model"] | changes.get("model", {})}))

    return write


def custom_code(folder: Path) -> None:
    settings(auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "own.py").write_text("raise SystemExit('the code of a base was run')")


def sentencepiece(folder: Path) -> None:
    settings(tokenizer_class="LlamaTokenizer")(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")


PANIC = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}], "pair": [], "special_tokens": {}}
BROKEN: dict[str, tuple[Break, str]] = {
    "cut off": (lambda folder: (folder / "tokenizer.json").write_text('{"version": '), "its tokenizer"),
    "empty": (lambda folder: (folder / "tokenizer.json").write_text(""), "its tokenizer"),
    "another kind of model": (inside(model={"type": "Foo"}), "its tokenizer"),
    "settings that are a list": (lambda folder: (folder / "tokenizer_config.json").write_text("[1]"), "its tokenizer"),
    "settings that are not JSON": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "its tokenizer"),
    "custom code": (custom_code, "its tokenizer: it needs code that comes with it"),
    "SentencePiece": (sentencepiece, "its tokenizer"),
    "a number as end token": (settings(eos_token=7), "its tokenizer"),
    "a length that is text": (settings(model_max_length="x"), "model_max_length is 'x'"),
    "a template that is a number": (settings(chat_template=0), "its chat template is int"),
    "a template that is no UTF-8": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{"), "its tokenizer"),
    "no unknown token": (inside(model={"unk_token": "<nowhere>"}), "its tokenizer"),
    "a panic of the Rust library": (inside(post_processor=PANIC), "its tokenizer: no entry found for key"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The directory of a base with a stand-in for its weights."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}))
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("load", [load_tokenizer, load_base])
def test_broken_tokenizer_files_are_an_error_that_names_the_base(kind: str, load: Callable[[Path], Any], base: Path) -> None:
    damage, says = BROKEN[kind]
    damage(base)
    with pytest.raises(ConfigError, match=says) as raised:
        load(base)
    assert f"the base {str(base)!r}" in raised.value.message


@pytest.mark.parametrize("kind", ["cut off", "a panic of the Rust library"])
def test_a_broken_tokenizer_of_an_adapter_says_what_to_do(kind: str, base: Path) -> None:
    BROKEN[kind][0](base)
    with pytest.raises(ConfigError, match=r"the adapter .* refuses its tokenizer") as raised:
        stored_tokenizer(base, None)
    assert raised.value.hint == "remove its tokenizer files to use the base's"


def test_what_is_missing_to_convert_a_sentencepiece_model_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byway.base.read_tokenizer.find_spec", lambda name: None)
    sentencepiece(base)
    with pytest.raises(ConfigError) as raised:
        load_tokenizer(base)
    assert raised.value.hint == "tokenizer.model is a SentencePiece model, to be converted: pip install sentencepiece protobuf"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_byte_order_mark_is_no_part_of_a_chat_template(place: str, base: Path) -> None:
    text = "{{ messages[0].content }}"
    if place.endswith("json"):
        (base / "chat_template.jinja").unlink(missing_ok=True)
        settings(chat_template="\ufeff" + text)(base)
    else:
        (base / place).write_text("\ufeff" + text, encoding="utf-8")
    assert read_tokenizer(base, "it").chat_template == text
    adapter = base.parent / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("\ufeff" + text, encoding="utf-8")
    stored: Any = stored_tokenizer(adapter, load_tokenizer(base))
    assert stored.chat_template == text


def test_interruptions_are_no_fault_of_the_files() -> None:
    with pytest.raises(KeyboardInterrupt), blaming("the base", "it"):
        raise KeyboardInterrupt
