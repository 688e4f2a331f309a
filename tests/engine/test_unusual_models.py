"""Models that do unusual things: every lever gives the plain loss, and the plain gradients of all that is trained and of the input.

In float64 and in training mode, with dropout in the base and in the adapter; what is drawn is fixed, so that two
computations are one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, MixtralConfig, MixtralForCausalLM

import byway
from byway.core.slots import base_modules
from byway.data.collate import pack_batch, pad_batch
from byway.data.encode import Example
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.loss.tokens import token_loss
from byway.train.levers.prove import at_work
from tests.engine.levers import FIRST
from tests.tiny import build, randomize

Trick = Callable[[nn.Module], Any]


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is −0.3 times the one it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -0.3 * gradients[0]


def _on(ending: str, change: Callable[[Tensor], Tensor]) -> Trick:
    """Change the output of every module whose path ends so."""

    def apply(model: nn.Module) -> None:
        for path, module in base_modules(model):
            if path.endswith(ending):
                module.register_forward_hook(lambda m, a, out: change(out))

    return apply


def _shared(model: nn.Module) -> None:
    layers: Any = model.get_submodule("model.layers")
    layers[2].mlp = layers[0].mlp


def _kept(out: Tensor) -> Tensor:
    out.retain_grad() if out.requires_grad else None
    return out


def _watched(out: Tensor) -> Tensor:
    if out.requires_grad:
        out.register_hook(lambda g: 1.5 * g)
    return out


TRICKS: dict[str, Trick] = {
    "a norm's output is added to in place": _on("layernorm", lambda out: out.add_(0.3)),
    "an activation's output is clamped in place": _on("act_fn", lambda out: out.clamp_(-0.05, 0.05)),
    "a norm's output is dropped in place": _on("layernorm", lambda out: nn.functional.dropout(out, 0.3, True, True)),
    "a norm's output is jittered in place": _on("layernorm", lambda out: out.mul_(torch.empty_like(out).uniform_(0.5, 1.5))),
    "a map's output passes a gradient reversal": _on("mlp.down_proj", _Reversed.apply),
    "a norm's output passes a gradient reversal": _on("post_attention_layernorm", _Reversed.apply),
    "a map's output keeps its gradient": _on("q_proj", _kept),
    "a map's gradient is changed by a hook": _on("up_proj", _watched),
    "two layers share a feed-forward part": _shared,
}
METHODS: dict[str, Callable[[], byway.Method]] = {
    "lora": lambda: byway.LoRA(rank=3, targets="all-linear", dropout=0.2),
    "dora": lambda: byway.DoRA(rank=2, targets="all-linear"),
    "bottleneck": lambda: byway.BottleneckAdapter(reduction=8),
    "parallel": lambda: byway.ParallelAdapter(reduction=8),
    "ia3": byway.IA3,
    "norms": byway.LayerNormTuning,
}


def rows() -> list[Example]:
    g = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 90, (n,), generator=g).tolist() for n in (6, 11, 3)]
    return [Example(input_ids=tuple(i), labels=(-100, -100, *i[2:]), where="") for i in ids]


def computed(model: Any, batch: Mapping[str, Tensor], *, labels_only: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of the trained tensors and of the embeddings."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total, _ = token_loss(model, batch, labels_only=labels_only)
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return total.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def compare(model: Any, *, upstream: bool) -> None:
    levers = [lever.trial() for lever in FIRST if not (upstream and lever.key == "frontier")]
    packs = not isinstance(model, MixtralForCausalLM | AlbertForMaskedLM)
    with at_work(model):
        plain = computed(model, pad_batch(rows(), 0), labels_only=False)
        for name, way in ({lever.key: [lever] for lever in levers} | {"all": levers}).items():
            packed = packs and any(lever.key == "pack" for lever in way)
            with ExitStack() as stack:
                for lever in way:
                    if lever.key != "pack" or packed:
                        stack.enter_context(lever.on(model))
                batch = pack_batch(rows()) if packed else pad_batch(rows(), 0)
                own = computed(model, batch, labels_only=any(lever.key == "labels_only" for lever in way))
            assert_same(own, plain, name)
    # it draws again in the backward pass, where draws are not fixed
    model.train()
    found = []
    for context in (nullcontext(), checkpointed(model)):
        torch.manual_seed(4)
        with context:
            found.append(computed(model, pad_batch(rows(), 0), labels_only=False))
    assert_same(found[1], found[0], "checkpointing")


def assert_same(own: tuple[Tensor, list[Tensor]], plain: tuple[Tensor, list[Tensor]], name: str) -> None:
    torch.testing.assert_close(own[0], plain[0], rtol=1e-9, atol=1e-9, msg=name)
    whole = torch.stack([g.norm() for g in plain[1]]).norm()
    apart = torch.stack([(a - b).norm() for a, b in zip(own[1], plain[1], strict=True)]).norm()
    assert whole > 0
    assert apart <= 1e-8 * whole, f"{name}: {float(apart / whole):.1e}"


def attached(model: Any, method: byway.Method, *, upstream: bool) -> Any:
    model.double()
    adapter = byway.attach(model, method)
    randomize(adapter.named_parameters())
    model.get_input_embeddings().weight.requires_grad_(upstream)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trick", TRICKS)
def test_every_lever_is_the_plain_computation(trick: str, method: str) -> None:
    model = build("llama")
    TRICKS[trick](model)
    compare(attached(model, METHODS[method](), upstream=True), upstream=True)


@pytest.mark.parametrize("trick", TRICKS)
def test_with_frozen_layers_below(trick: str) -> None:
    model = build("llama")
    TRICKS[trick](model)
    compare(attached(model, byway.LoRA(rank=3, layers="1-", targets="all-linear", dropout=0.2), upstream=False), upstream=False)


def test_a_layer_that_is_run_many_times() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=97, embedding_size=16, hidden_dropout_prob=0.2, **sizes))
    compare(attached(model, byway.LoRA(rank=3, targets=["query", "value"], dropout=0.2), upstream=True), upstream=True)


def test_a_jittering_mixture_of_experts() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=97, num_hidden_layers=2, num_local_experts=4, router_jitter_noise=0.4, **sizes)
    config._experts_implementation = "eager"  # the grouped product has no float64
    compare(
        attached(MixtralForCausalLM(config), byway.LoRA(rank=3, targets=["q_proj", "v_proj"], dropout=0.2), upstream=True), upstream=True
    )
