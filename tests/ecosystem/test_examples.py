"""Every script in examples/ runs, in two steps, on small models."""

from __future__ import annotations

import gzip
import re
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what bitsandbytes, accelerate and the pipeline say of themselves
        yield
    torch.set_num_threads(threads)


def script(name: str) -> Callable[[list[str]], None]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def write_base(directory: Path, template: str | None) -> Path:
    """A tiny Llama with a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokens = ["<pad>", "<s>", "</s>", *characters]
    own = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    own.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    tiny.llama(vocab_size=len(tokens), **sizes).save_pretrained(directory)
    return directory


def test_every_example_is_run_by_some_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [path.name for path in EXAMPLES.glob("*.py") if path.stem not in tests]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(
    "template", ["{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}", None], ids=["template", "none"]
)
def test_the_classic_flow(quantize: str, template: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", template)
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    out = tmp_path / "out"
    script("qwen_qlora.py")(["--model", str(base), "--quantize", quantize, "--steps", "2", "--output", str(out)])
    said = capsys.readouterr().out
    assert re.search(r"step   2  loss \d+\.\d{4}", said)
    before, after, merged = (re.search(rf"^{word}: *(.*)$", said, re.MULTILINE) for word in ("before", "after", "merged"))
    assert before and after and merged
    assert merged[1] == after[1]
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and (out / "merged" / "model.safetensors").is_file()
    assert "quantization_config" not in (out / "merged" / "config.json").read_text()


@pytest.mark.parametrize("real", [True, False], ids=["MNIST", "drawn"])
def test_a_perceptron_with_an_adapter(
    real: bool, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BYWAY_DATA", raising=False)
    arguments = ["--steps", "2"]
    if real:
        folder: Path = request.getfixturevalue("data_dir") / "mnist"
        arguments += ["--mnist", str(_first(folder, tmp_path))]
    script("own_loop_mlp.py")(arguments)
    said = capsys.readouterr().out
    assert ("using generated digits" in said) is not real
    assert "exactly as before" in said
    assert "merged 3 modules" in said and "a plain Sequential again" in said


def _first(folder: Path, tmp_path: Path, count: int = 100) -> Path:
    """The first rows of MNIST's files, so that two steps do not wait for the other thousands."""
    for path in folder.glob("*.gz"):
        raw = gzip.decompress(path.read_bytes())
        header = 4 + 4 * raw[3]
        row = 28 * 28 if raw[3] == 3 else 1
        short = raw[:4] + count.to_bytes(4, "big") + raw[8:header] + raw[header : header + count * row]
        (tmp_path / path.name).write_bytes(gzip.compress(short))
    return tmp_path


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_a_script_written_for_peft_and_trl(quantize: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    base, out = write_base(tmp_path / "base", TEMPLATE), tmp_path / "out"
    command = ["--model", str(base), "--quantize", quantize, "--output", str(out), "--steps"]
    for arguments in (["2"], ["4", "--resume"]):
        script("sft_trainer.py")([*command, *arguments])
    said = capsys.readouterr().out
    assert "trainable params: " in said and len(re.findall(r"^merged: ", said, re.MULTILINE)) == 2
    assert (out / "run" / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert (out / "merged" / "model.safetensors").is_file()
    assert "quantization_config" not in (out / "merged" / "config.json").read_text()


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_trainer_on_an_attached_model(quantize: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    base, out = write_base(tmp_path / "base", None), tmp_path / "out"
    script("trainer.py")(["--model", str(base), "--quantize", quantize, "--steps", "8", "--output", str(out)])
    first, last = re.findall(r"loss: (\d+\.\d+) → (\d+\.\d+)", capsys.readouterr().out)[0]
    assert float(last) < float(first)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
