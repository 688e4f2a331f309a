"""A run on a vision-language base says which parts it adapts and what text never reaches; a key restricts it to the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import byway
from byway.train import train
from byway.train.reporting.events import Note
from tests import unlisted
from tests.train.conftest import text_rows, write_rows, write_tokenizer

pytestmark = pytest.mark.usefixtures("quick_picture")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {
        **sizes,
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    ids = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base") / "gemma3"
    transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)).save_pretrained(
        directory
    )
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("layers", [None, "language-model"])
def test_towers_that_text_never_reaches_are_named(base: Path, tmp_path: Path, layers: str | None) -> None:
    method: dict[str, Any] = {"name": "lora", "rank": 2, "targets": "all-linear"} | ({} if layers is None else {"layers": layers})
    recipe = {
        "base": {"model": str(base), "device": "cpu"},
        "method": method,
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", text_rows(8))), "task": "text", "max_length": 32},
        "train": {"epochs": 1, "rows_per_step": 8, "threads": 1},
        "output": str(tmp_path / "run"),
    }
    told: list[str] = []
    run = train(recipe, on_event=lambda event: told.append(event.text) if isinstance(event, Note) else None)
    names = dict(run.adapter.named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
    seen = sum(p.numel() for n, p in names.items() if "vision_tower" in n)
    lost = [text for text in told if "never receive a gradient" in text]
    if layers is None:
        assert "adapted parts: vision_tower (8 modules), language_model (14 modules)" in told
        assert len(lost) == 1 and lost[0].startswith(f"not run on these rows: vision_tower; {seen:,} trainable parameters")
    else:
        assert "adapted parts: language_model (14 modules)" in told and not lost and not seen
    assert len([n for n in names if "language_model" in n]) == 28


def test_the_language_model_is_a_selection_of_layers() -> None:
    def adapted(name: str, **fields: Any) -> set[str]:
        adapter = byway.attach(unlisted.build(name), byway.LoRA(rank=2, targets="all-linear", **fields))
        return {path.rpartition(".byway")[0] for path, _ in adapter.named_parameters()}

    every = adapted("qwen2_5_vl")
    language = {path for path in every if path.startswith("model.language_model.layers.")}
    assert 0 < len(language) < len(every)
    assert adapted("qwen2_5_vl", layers="language-model") == language
    assert adapted("qwen2_5_vl", layers="language-model:1-") == {path for path in language if ".layers.1." in path}
    assert adapted("gemma4_text", layers="language-model") == {path for path in adapted("gemma4_text") if ".layers." in path}
    with pytest.raises(byway.TargetError, match="the model has no text decoder"):
        adapted("pixtral", layers="language-model")
