"""Parallel adapters against the paper's formula, written out once more on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway
from byway.methods.bottleneck.sides import Bottleneck
from tests import zoo
from tests.tiny import build, inputs, randomize

FEED_FORWARDS = {
    # family → (what reads the feed-forward's input, what answers for it) below a layer
    "llama": ("mlp", "mlp"),
    "gpt2": ("mlp", "mlp"),
    "opt": ("fc1", "fc2"),
    "bert": ("intermediate.dense", "output.dense"),
    "roberta": ("intermediate.dense", "output.dense"),
    "vit": ("mlp", "mlp"),
    "t5": ("layer.{}.DenseReluDense", "layer.{}.DenseReluDense"),
}


def by_hand(model: Any, twin: Any, family: str, x: dict[str, Any], scale: Any) -> Tensor:
    """FFN(x) + s·f(x) on `twin`, which has no adapter, by hooks of this test's own."""
    adapter = byway.adapters(model)["default"]
    bottlenecks = [side for _, side in adapter.side_paths() if isinstance(side, Bottleneck)]
    layers = [
        m
        for m in twin.modules()
        if type(m).__name__ in ("T5Block", "GPT2Block")
        or type(m).__name__.endswith(("DecoderLayer", "BertLayer", "RobertaLayer", "ViTLayer"))
    ]
    assert len(layers) == len(bottlenecks)
    for layer, side in zip(layers, bottlenecks, strict=True):
        start, end = (name.format(len(layer.layer) - 1) if family == "t5" else name for name in FEED_FORWARDS[family])
        kept: list[Tensor] = []
        layer.get_submodule(start).register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        p = dict(side.named_parameters())

        def add(m: nn.Module, args: Any, out: Tensor, kept: list[Tensor] = kept, p: dict[str, Tensor] = p) -> Tensor:
            h = kept.pop()
            return out + scale(p) * (F.relu(h @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"])

        layer.get_submodule(end).register_forward_hook(add)
    return twin(**x).logits


@pytest.mark.parametrize("family", FEED_FORWARDS)
@pytest.mark.parametrize("scaling", [4.0, "learned"])
def test_the_branch_reads_what_the_feed_forward_reads(family: str, scaling: Any, seed: int) -> None:
    model, twin, x = build(family, seed).double(), build(family, seed).double(), inputs(family, seed)
    if family == "vit":
        x = {"pixel_values": x["pixel_values"].double()}
    adapter = byway.attach(model, byway.ParallelAdapter(scaling=scaling, modules_to_save="none"))
    randomize(adapter.named_parameters(), seed, scale=0.3)
    expected = by_hand(model, twin, family, x, lambda p: p["scaling"] if scaling == "learned" else 4.0)
    found = model(**x).logits
    assert (found - expected).norm() / expected.norm() < 1e-12
    found.pow(2).sum().backward()
    ours = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.pow(2).sum().backward()
    assert ours.keys() == dict(adapter.named_parameters()).keys()
    for name, p in adapter.named_parameters():
        assert p.grad is not None
        assert (ours[name] - p.grad).norm() <= 1e-9 * p.grad.norm(), name


def test_counts() -> None:
    assert byway.attach(build("llama"), byway.ParallelAdapter(size=5)).num_parameters == 3 * (2 * 32 * 5 + 5 + 32)
    learned = byway.attach(build("llama"), byway.ParallelAdapter(size=5, scaling="learned", layer_norm="out"))
    assert learned.num_parameters == 3 * (2 * 32 * 5 + 5 + 32 + 1 + 64)


def test_residual_in_a_parallel_block_is_refused() -> None:
    with pytest.raises(byway.TargetError, match="no residual of its own"):
        byway.attach(zoo.build("phi"), byway.ParallelAdapter(reads="residual"))


def test_two_at_once_each_read_their_own_input() -> None:
    model, x = build("opt"), inputs("opt")
    plain = model(**x).logits
    for name in ("one", "two"):
        adapter = byway.attach(model, byway.ParallelAdapter(init="bert"), name=name)
        randomize(adapter.named_parameters())
    both = model(**x).logits
    byway.activate(model, "two")
    assert not torch.equal(model(**x).logits, both)
    byway.activate(model, [])
    assert torch.equal(model(**x).logits, plain)


def test_a_forward_that_broke_off_leaves_nothing_behind() -> None:
    import copy

    model, x = build("bert"), inputs("bert")
    byway.attach(model, byway.ParallelAdapter())
    expected = model(**x).logits
    handle = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**x)
    handle.remove()
    assert torch.equal(copy.deepcopy(model)(**x).logits, expected)
    assert torch.equal(model(**x).logits, expected)


@pytest.mark.parametrize(("fields", "says"), [({"reads": "norm"}, "reads"), ({"scaling": 0}, "scaling"), ({"size": True}, "size")])
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(byway.ConfigError, match=says):
        byway.ParallelAdapter(**fields)
