"""What a base's name means, and what is said where it means nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from byway.base.source import BUILT_IN, locate
from byway.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "llama-small").mkdir(parents=True)
    (tmp_path / "models" / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "models" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_kind_is_told_apart(here: Path) -> None:
    assert locate(BUILT_IN).kind == "built-in"
    assert locate("models/llama-small").kind == "directory"
    assert locate(here / "models").kind == "directory"
    assert locate("models/weights.gguf").kind == "gguf"
    assert locate("gpt2").kind == "hub"
    assert locate("owner/name-1.5B").kind == "hub"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("models/llama-smal", "does not exist", "models/llama-small"),
        ("./models/llama-smal", "no such directory or file", "models/llama-small"),
        ("modles/llama-small/deep", "no such directory or file", "did you mean 'models'"),
        ("/nowhere/at/all", "no such directory or file", "has no entry 'nowhere'"),
        ("models/weight.gguf", "no such directory or file", "models/weights.gguf"),
        ("models/config.json", "is a file", "'models'"),
        ("smollm2-135m-instuct", "there is no base", BUILT_IN),
        ("SmolLM2-135M-Instruct", "there is no base", BUILT_IN),
        ("what is this?", "neither a path that exists nor a hub id", "owner/name"),
        ("", "neither a path nor a name", BUILT_IN),
        ("a\0b", "neither a path nor a name", BUILT_IN),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_is_near(here: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(name)
    assert message in caught.value.message
    assert repr(name)[1:-1] in caught.value.message
    assert hint in caught.value.hint


def test_a_path_object_is_never_a_hub_id(here: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        locate(Path("gpt2"))


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, byway.base; print([name for name in ('torch', 'transformers', 'safetensors', 'gguf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
