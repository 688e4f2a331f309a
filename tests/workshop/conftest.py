"""Tiny bases with a real tokenizer and chat template, and adapters that visibly change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

torch.set_num_threads(1)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCE = "the cat sat on a mat and then ran off to see what rain was like in town while all others slept"
WORDS = SENTENCE.split()


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE over a few sentences, with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator([" ".join(WORDS)] * 4 + ["user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, vocabulary: int = 300, layers: int = 2) -> Any:
    """A random Llama whose weights are large enough that an answer is not one token for ever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=vocabulary,
        max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2, eos_token_id=2, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def saved(model: Any, path: Path, tokenizer: Any = None, **options: Any) -> Path:
    """`model` (and a tokenizer) as files."""
    from byway.base.quiet import quiet

    with quiet():
        model.save_pretrained(path, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    return path


def moved_off_zero(adapter: Any, scale: float = 0.2) -> Any:
    """Give every trained tensor values that matter."""
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return adapter


def adapter_for(base: Path, path: Path, **options: Any) -> Path:
    """A LoRA on the base in `base`, written to `path`."""
    from byway import LoRA, attach, load_base

    task = options.pop("task", "auto")
    labels = options.pop("num_labels", None)
    model, _ = load_base(base, task=task, num_labels=labels)
    adapter = moved_off_zero(attach(model, LoRA(**{"rank": 4, "alpha": 8, **options})))
    return adapter.save(path)


def chat_rows(path: Path, count: int, start: int = 0) -> Path:
    """So many small conversations."""
    lines = []
    for i in range(start, start + count):
        question, answer = WORDS[i % len(WORDS)], WORDS[(i + 3) % len(WORDS)]
        lines.append(json.dumps({"messages": [{"role": "user", "content": f"{question} {i}"}, {"role": "assistant", "content": answer}]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def chat_base(tmp_path: Path, seed: int) -> Path:
    """A tied Llama with a chat template, in a directory."""
    return saved(llama(tied=True), tmp_path / "base", chat_tokenizer())


@pytest.fixture
def chat_adapter(chat_base: Path, tmp_path: Path) -> Path:
    return adapter_for(chat_base, tmp_path / "adapter", targets=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def logits():
    def of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits.float()

    return of
