"""Several methods on one model at once: together they are what one is on top of the other, and each can be had alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import byway
from byway.core.method import Method
from tests.tiny import build, inputs, randomize

LORA = byway.LoRA(rank=4, targets="attention", modules_to_save="none")
PAIRS: list[tuple[str, str, Method]] = [
    ("bottleneck on the feed-forward", "llama", byway.BottleneckAdapter(modules_to_save="none")),
    ("bottleneck on the feed-forward", "bert", byway.BottleneckAdapter(modules_to_save="none")),
    ("prompt", "llama", byway.PromptTuning(num_virtual_tokens=3, modules_to_save="none")),
    ("prompt", "t5", byway.PromptTuning(num_virtual_tokens=3, modules_to_save="none")),
    ("prefix", "gpt2", byway.PrefixTuning(num_virtual_tokens=3, modules_to_save="none")),
    ("prefix", "bert", byway.PrefixTuning(num_virtual_tokens=3, modules_to_save="none")),
    ("ia3", "t5", byway.IA3(modules_to_save="none")),
    ("layer norms", "vit", byway.LayerNormTuning(modules_to_save="none")),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[1]}-{pair[0]}".replace(" ", "_"))
def pair(request: pytest.FixtureRequest) -> tuple[str, Method]:
    return request.param[1], request.param[2]


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


def attached(family: str, *methods: tuple[str, Method, int]) -> Any:
    model = build(family)
    for name, method, seed in methods:
        randomize(byway.attach(model, method, name).named_parameters(), seed=seed)
    return model


def test_two_methods_together_are_the_second_over_a_base_with_the_first_merged(pair: tuple[str, Method]) -> None:
    family, other = pair
    both = attached(family, ("lora", LORA, 1), ("other", other, 2))
    merged = attached(family, ("lora", LORA, 1))
    byway.merge(merged, "lora")
    randomize(byway.attach(merged, other, "other").named_parameters(), seed=2)
    expected = logits(merged, family)
    assert (logits(both, family) - expected).norm() < 1e-5 * expected.norm()


def test_each_of_two_methods_can_be_had_alone_and_neither_is_the_base(pair: tuple[str, Method]) -> None:
    family, other = pair
    model = attached(family, ("lora", LORA, 1), ("other", other, 2))
    both = logits(model, family)
    for name, method, seed in (("lora", LORA, 1), ("other", other, 2)):
        byway.activate(model, name)
        alone = logits(attached(family, (name, method, seed)), family)
        assert torch.equal(logits(model, family), alone)
        assert not torch.equal(alone, both)
    byway.activate(model, ["lora", "other"])
    assert torch.equal(logits(model, family), both)
    byway.detach(model, "other")
    assert torch.equal(logits(model, family), logits(attached(family, ("lora", LORA, 1)), family))


def test_both_are_trained_at_once_and_each_gets_a_gradient(pair: tuple[str, Method]) -> None:
    family, other = pair
    model = attached(family, ("lora", LORA, 1), ("other", other, 2))
    model(**inputs(family)).logits.float().pow(2).mean().backward()
    for adapter in byway.adapters(model).values():
        assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_saved_apart_and_loaded_beside_each_other_they_give_the_same(pair: tuple[str, Method], tmp_path: Path) -> None:
    family, other = pair
    model = attached(family, ("lora", LORA, 1), ("other", other, 2))
    for name, adapter in byway.adapters(model).items():
        adapter.save(tmp_path / name)
    fresh = build(family)
    for name in ("lora", "other"):
        byway.load(fresh, tmp_path / name, name)
    assert torch.equal(logits(fresh, family), logits(model, family))
