"""The cache on other families: exact, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import byway
from byway.core.families import facts
from byway.engine.backward.frontier import frontier
from byway.engine.cache import TrunkCache
from byway.errors import AdapterError
from tests import zoo

EXACT = {
    "gemma2": "layer 1 of 2",
    "mixtral": "layer 1 of 2",
    "qwen2_moe": "layer 1 of 2",
    "deepseek_v3": "layer 1 of 2",
    "falcon": "layer 1 of 2",
    "gpt_neox": "layer 1 of 2",
    "modernbert": "layer 1 of 2",
    "deberta-v2": "layer 1 of 2",
    "wav2vec2": "layer 1 of 2",
    "swin": "layer 3 of 4",
    "whisper": "the encoder's output",
    "marian": "the encoder's output",
}
REFUSED = {
    "bloom": "returns more than hidden states",
    "gptj": "returns more than hidden states",
    "clip": "CLIPModel has several towers",
    "albert": "the first of 1 layers is trained",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapted(name: str) -> Any:
    """A model with LoRA on the attention of the last layer, or of an encoder-decoder's whole decoder."""
    model = zoo.build(name).eval()
    found = facts(model)
    last = list(found.stacks.values())[-1]
    layers = last if len(found.stacks) > 1 else last[-1:]
    targets = [path for path in found.attention_linears if any(path.startswith(f"{layer}.") for layer in layers)]
    byway.attach(model, byway.LoRA(rank=2, targets=targets, modules_to_save="none"))
    return model


def cache_of(model: Any, inputs: dict[str, Any]) -> TrunkCache:
    rows = len(next(iter(inputs.values())))

    def collate(indices: Any) -> dict[str, Any]:
        return {key: value[list(indices)] if isinstance(value, Tensor) else value for key, value in inputs.items()}

    return TrunkCache(model, collate, [inputs["input_ids"].shape[1]] * rows if "input_ids" in inputs else rows)


def numbers(out: Any) -> list[Tensor]:
    return [value for value in out.values() if isinstance(value, Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("name", EXACT)
def test_states_from_the_cache_give_the_live_output(name: str) -> None:
    model = adapted(name)
    inputs = zoo.inputs(model)
    cache = cache_of(model, inputs)
    assert cache.shortcut.where == EXACT[name]
    with torch.no_grad():
        with frontier(model):
            live = numbers(model(**inputs))
        with cache.replay(range(len(next(iter(inputs.values()))))):
            replayed = numbers(model(**inputs))
    assert live and len(live) == len(replayed)
    for one, other in zip(live, replayed, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_says_why(name: str) -> None:
    model = adapted(name)
    with pytest.raises(AdapterError, match=REFUSED[name]):
        cache_of(model, zoo.inputs(model))


def test_a_layer_that_is_run_many_times_gives_its_last_output() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embedding_size": 16,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
    }
    model = AlbertForSequenceClassification(AlbertConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval()
    byway.attach(model, byway.Full(targets=["classifier"]))
    inputs = {"input_ids": torch.randint(3, 97, (4, 7))}
    cache = cache_of(model, inputs)
    (given,) = (cache.survey.given[path] for path in cache.shortcut.gives)
    assert given.calls == 3 and cache.shortcut.where == "above layer 1"
    with torch.no_grad(), cache.replay([2, 0]):
        replayed = model(input_ids=inputs["input_ids"][[2, 0]]).logits
    assert torch.allclose(replayed, model(input_ids=inputs["input_ids"][[2, 0]]).logits, atol=1e-6)
