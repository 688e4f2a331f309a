"""Recomputed layers give the same loss and gradients, with dropout, packs and prefixes, and keep only their input."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.attention import packed
from byway.core.families import facts
from byway.engine.attention.packing import packing
from byway.engine.backward.checkpointing import checkpointed, recomputable
from byway.engine.backward.frontier import frontier
from byway.train.plan.live import live
from tests import tiny, zoo


def attached(family: str, method: Any = None, seed: int = 0) -> tuple[Any, byway.Adapter, dict[str, Any]]:
    model, x = tiny.build(family, seed), tiny.inputs(family)
    adapter = byway.attach(model, method or byway.LoRA(rank=2, targets="all-linear", dropout=0.3))
    tiny.randomize(adapter.named_parameters())
    return model.train(), adapter, x


def computed(model: nn.Module, adapter: byway.Adapter, x: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients of all trainable tensors), always with the same dropout."""
    torch.manual_seed(11)
    logits = model(**x).logits
    names = dict(adapter.named_parameters())
    found = torch.autograd.grad(logits.float().pow(2).mean(), list(names.values()), allow_unused=True)
    return logits.detach(), {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), found, strict=True)}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(other[1][name], g) for name, g in one[1].items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_dropout_everywhere_loss_and_gradients_are_equal_bit_for_bit(family: str) -> None:
    model, adapter, x = attached(family)
    expected = computed(model, adapter, x)
    assert any(bool(g.any()) for g in expected[1].values())
    with checkpointed(model) as count:
        assert count == tiny.LAYERS * len(facts(model).stacks)
        assert same(computed(model, adapter, x), expected)
    assert not [path for path in recomputable(model) if "forward" in vars(model.get_submodule(path))]


@pytest.mark.parametrize("name", ["mpnet", "albert"])
def test_layers_without_transformers_switch_are_recomputed_too(name: str) -> None:
    model, x = zoo.build(name), zoo.inputs(zoo.shared(name))
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear", dropout=0.3))
    tiny.randomize(adapter.named_parameters())
    model.train()
    expected = computed(model, adapter, x)
    calls: list[int] = []
    layer = model.get_submodule(recomputable(model)[-1])
    handle = layer.attention.register_forward_hook(lambda m, a, out: calls.append(1))
    with checkpointed(model):
        assert same(computed(model, adapter, x), expected)
    handle.remove()
    assert len(calls) == (4 if name == "albert" else 2), "each call of the layer must run twice"


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gpt2", byway.PTuningV2(num_virtual_tokens=2)),
        ("t5", byway.PrefixTuning(num_virtual_tokens=2, dropout=0.2)),
        ("llama", byway.PromptTuning(num_virtual_tokens=2)),
        ("bert", byway.BottleneckAdapter(reduction=4)),
        ("llama", byway.DoRA(rank=2)),
    ],
)
def test_other_methods_are_exact_too(family: str, method: Any) -> None:
    model, adapter, x = attached(family, method)
    expected = computed(model, adapter, x)
    with checkpointed(model):
        assert same(computed(model, adapter, x), expected)


def test_packed_documents_and_muted_adapters_are_what_they_were_in_the_backward_pass() -> None:
    """A layer is recomputed after the contexts have ended, and must still see their values."""
    model, adapter, _ = attached("llama")
    lengths = (3, 5, 4)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    x = {
        "input_ids": torch.randint(3, tiny.VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(2)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "use_cache": False,
    }

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(4)
        with packed():
            logits = model(**x).logits
        with byway.disabled(model):
            bare = model(**x).logits.detach()
        names = dict(adapter.named_parameters())
        with byway.disabled(model):  # the backward pass starts in a context without adapters
            found = torch.autograd.grad((logits - bare).pow(2).mean(), list(names.values()))
        return logits.detach(), dict(zip(names, found, strict=True))

    with packing(model):
        expected = loss_and_gradients()
        with checkpointed(model):
            assert same(loss_and_gradients(), expected)


def test_only_layers_above_the_frontier_are_recomputed() -> None:
    model, adapter, x = attached("bert", byway.LoRA(rank=2, layers="1-", modules_to_save="none"))
    assert recomputable(model) == ("bert.encoder.layer.1", "bert.encoder.layer.2")
    runs: list[str] = []
    handles = [
        model.get_submodule(path).attention.register_forward_hook(lambda m, a, out, path=path: runs.append(path))
        for path in facts(model).stacks["encoder"]
    ]
    with frontier(model):
        expected = computed(model, adapter, x)
        runs.clear()
        with checkpointed(model):
            assert same(computed(model, adapter, x), expected)
    for handle in handles:
        handle.remove()
    assert [runs.count(path) for path in facts(model).stacks["encoder"]] == [1, 2, 2]


def test_layers_can_be_chosen() -> None:
    model, adapter, x = attached("gpt2")
    expected = computed(model, adapter, x)
    with checkpointed(model, ["transformer.h.1"]) as count:
        assert count == 1
        assert [("forward" in vars(layer)) for layer in model.transformer.h] == [False, True, False]
        assert same(computed(model, adapter, x), expected)


def alive(model: nn.Module, x: dict[str, Any]) -> int:
    with live(model, x) as count:
        out = model(**x)
        kept = count.now()
    del out
    return kept


def test_less_is_kept_with_every_layer_more() -> None:
    model, _, _ = attached("llama")
    x = tiny.inputs("llama", rows=4, length=24)
    layers = recomputable(model)
    found = []
    for chosen in (layers[:k] for k in range(len(layers) + 1)):
        with checkpointed(model, chosen) if chosen else contextlib.nullcontext():
            found.append(alive(model, x))
    saved = [a - b for a, b in pairwise(found)]
    assert all(s > 4 * 4 * 24 * 32 * 10 for s in saved), "a layer keeps at least ten hidden states of 32 float32 numbers"


def test_a_model_that_fills_a_cache_is_told_not_to_and_one_that_is_given_one_is_run_plainly() -> None:
    from transformers import DynamicCache

    model, adapter, x = attached("t5", byway.LoRA(rank=2))
    del x["use_cache"]  # T5 creates a cache by default
    expected = computed(model, adapter, x)
    with checkpointed(model):
        assert same(computed(model, adapter, x), expected)
        assert model(**x).past_key_values is None
        with torch.no_grad():
            assert model(**x).past_key_values is not None
    model, adapter, x = attached("llama", byway.LoRA(rank=2))

    def continued() -> tuple[Tensor, dict[str, Tensor]]:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=x["input_ids"], past_key_values=cache, use_cache=True)
        return computed(model, adapter, {"input_ids": x["input_ids"], "past_key_values": cache, "use_cache": True})

    expected = continued()
    with checkpointed(model):
        assert same(continued(), expected)


def test_where_no_layer_has_a_graph_nothing_can_be_recomputed() -> None:
    model, _, _ = attached("bert", byway.Full(targets=["classifier"]))
    assert recomputable(model) == ()
    with pytest.raises(byway.ConfigError, match="no layer keeps"), checkpointed(model):
        pass
    plain = nn.Sequential(nn.Linear(4, 4))
    byway.attach(plain, byway.LoRA(rank=1, targets=["0"]))
    with pytest.raises(byway.TargetError, match="stacks"), checkpointed(plain):
        pass


def test_the_model_is_as_before_after_an_error_and_instance_forwards_come_back() -> None:
    model, _, x = attached("gpt2")
    layer = model.transformer.h[1]
    original = type(layer).forward
    seen: list[int] = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(layer, *args, **kwargs)

    layer.forward = mine
    with pytest.raises(ValueError, match="stop"), checkpointed(model):
        model(**x).logits.sum().backward()
        assert len(seen) == 2
        raise ValueError("stop")
    assert layer.forward is mine
    assert "forward" not in vars(model.transformer.h[0])


def test_what_is_alive_is_counted_exactly() -> None:
    """Input (64, 32) in float32, two maps of 32 × 32: 8192 bytes each for both outputs and the tensor that tanh
    keeps."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))
    x = {"x": torch.randn(64, 32)}
    with live(model, x) as count:
        out = model(x["x"])
        # the first product is freed: tanh keeps its own output
        assert (count.peak(), count.now()) == (3 * 8192, 2 * 8192) or (count.peak(), count.now()) == (2 * 8192, 2 * 8192)
        again = out.view(-1)
        assert count.now() == 2 * 8192
        del out, again
        assert count.now() == 0
