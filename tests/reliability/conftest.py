"""Shared by the cases: a tiny base, an adapter for it, a finished run; no network, one thread."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.table import TEXTS, Shared, World, recipe

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["one two three"], trainers.BpeTrainer(vocab_size=264, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    own.chat_template = TEMPLATE
    return own


def llama(**changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **(sizes | changes), num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=2
    )
    torch.manual_seed(11)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def picture() -> Iterator[None]:
    """Skip the loss curve: no check looks at it, and drawing takes most of a run of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("byway.train.reporting.report"), "curve_png", lambda rows, best_step=None: b"")
        yield


@pytest.fixture(scope="session")
def shared(picture: None, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    import torch

    import byway
    from byway.base.quiet import quiet

    folder = tmp_path_factory.mktemp("reliability")
    with quiet():
        llama().save_pretrained(folder / "base")
        tokenizer().save_pretrained(folder / "base")
    model, own = byway.load_base(folder / "base")
    adapter = byway.attach(model, byway.LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")), tokenizer=own)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    adapter.save(folder / "adapter")
    World(folder, Shared(folder / "base", folder / "adapter", folder / "run")).rows(*TEXTS, name="train.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        byway.train(recipe(folder / "base"))
    return Shared(folder / "base", folder / "adapter", folder / "run")


@pytest.fixture
def world(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, shared)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of attempted connections; none succeeds."""
    tried: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("there is no network in these tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried
