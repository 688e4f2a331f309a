"""Models that do unusual things: every lever gives the plain loss, and the plain gradients of all that is trained and of the input.

In float64 and in training mode, with dropout in the base and in the adapter; what is drawn is fixed, so that two
computations are one function.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, MixtralConfig, MixtralForCausalLM

import byway
from byway.core.slots import base_modules
from byway.data.collate import pack_batch, pad_batch
from byway.data.encode import Example
from byway.engine.backward.checkpointing import checkpointed, recomputable
from byway.engine.backward.recompute import recomputed
from byway.engine.loss.tokens import token_loss
from byway.engine.shared_prefix import LEAST, share
from byway.train.levers.checkpointing import Checkpointing
from byway.train.levers.choose import levers
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Lever
from byway.train.levers.prove import at_work, repeats
from tests.tiny import build, randomize

Trick = Callable[[nn.Module], Any]


class NoisyRMSNorm(nn.Module):
    """A norm that draws: it gives something else when it is run again."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return out * (1 + 0.3 * torch.randn_like(out)) if self.training else out


class ViewRMSNorm(nn.Module):
    """Returns a view of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


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


def _norms(made: Callable[[Tensor], nn.Module]) -> Trick:
    def apply(model: nn.Module) -> None:
        for layer in cast("Any", model).model.layers:
            layer.input_layernorm = made(layer.input_layernorm.weight.detach())

    return apply


def _before(ending: str, change: Callable[[Tensor], Any]) -> Trick:
    """Change the input of every module whose path ends so."""

    def apply(model: nn.Module) -> None:
        for path, module in base_modules(model):
            if path.endswith(ending):
                module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))

    return apply


def _viewed(model: nn.Module) -> None:
    _norms(lambda weight: ViewRMSNorm())(model)
    _on("input_layernorm", lambda out: out.mul_(1.1))(model)


def _branches_dropped(out: Tensor) -> Tensor:
    return out * torch.empty(out.shape[-1:], dtype=out.dtype).bernoulli_(0.7)


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
    "a layer's input is scaled in place": _before("input_layernorm", lambda x: x.mul_(1.1)),
    "the embeddings are scaled in place": _on("embed_tokens", lambda out: out.mul_(1.1)),
    "branches are dropped": _on("o_proj", _branches_dropped),
    "a norm draws": _norms(NoisyRMSNorm),
    "a norm returns a view, which is changed in place": lambda model: (
        _norms(lambda _: ViewRMSNorm())(model),
        _on("input_layernorm", lambda out: out.mul_(1.1))(model),
    ),
    "two layers share a feed-forward part": _shared,
}
CHANGED = ("a layer's input is scaled in place", "a norm returns a view, which is changed in place")
NEEDS = {"share_prefix": ("pack",), "last_layer": ("labels_only",)}
UNFIT: dict[type, tuple[str, ...]] = {
    MixtralForCausalLM: ("pack", "share_prefix"),
    AlbertForMaskedLM: ("pack", "share_prefix", "last_layer"),
}
"""Levers that are refused for a model."""
METHODS: dict[str, Callable[[], byway.Method]] = {
    "lora": lambda: byway.LoRA(rank=3, targets="all-linear", dropout=0.2),
    "dora": lambda: byway.DoRA(rank=2, targets="all-linear"),
    "bottleneck": lambda: byway.BottleneckAdapter(reduction=8),
    "parallel": lambda: byway.ParallelAdapter(reduction=8),
    "ia3": byway.IA3,
    "norms": byway.LayerNormTuning,
}


def rows() -> list[Example]:
    """Two of the three share their first tokens, none of which is in the loss."""
    g = torch.Generator().manual_seed(5)
    head, *ids = (torch.randint(3, 90, (n,), generator=g).tolist() for n in (LEAST, 5, 7, 4))
    ids = [head + ids[0], head + ids[1], ids[2]]
    return [Example(input_ids=tuple(i), labels=(*[-100] * (len(i) - 3), *i[-3:]), where="") for i in ids]


def computed(model: Any, batch: Mapping[str, Tensor], *, labels_only: bool) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of the trained tensors and of the embeddings."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total, _ = token_loss(model, batch, labels_only=labels_only)
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return total.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def ways(model: Any, *, upstream: bool) -> dict[str, list[Lever]]:
    """The levers alone, with those that they need, and all together."""
    found = {lever.key: lever.trial() for lever in levers() if lever.stage != "planned"}
    if upstream:
        del found["frontier"]
    for key in UNFIT.get(type(model), ()):
        del found[key]
    every = list(found.values())
    return {key: [found[need] for need in NEEDS.get(key, ()) if need in found] + [lever] for key, lever in found.items()} | {"all": every}


def compare(model: Any, *, upstream: bool, changed: bool = False) -> None:
    """`changed`: layers change their input in place, so that they cannot be run again."""
    with at_work(model):
        plain = computed(model, pad_batch(rows(), 0), labels_only=False)
        for name, way in ways(model, upstream=upstream).items():
            keys = {lever.key for lever in way}
            batch = pack_batch(rows()) if "pack" in keys else pad_batch(rows(), 0)
            if "share_prefix" in keys:
                batch = share(batch)
                assert batch["input_ids"].numel() < sum(len(row.input_ids) for row in rows())
            with ExitStack() as stack:
                for lever in way:
                    stack.enter_context(lever.on(model))
                own = computed(model, batch, labels_only="labels_only" in keys)
            # the norms of transformers are computed in float32, and gradients of a shared prefix are added up before them
            assert_same(own, plain, name, 1e-6 if "share_prefix" in keys else 1e-8)
    # what is drawn again in the backward pass is not fixed there
    model.train()
    found = []
    for context in (nullcontext(), recomputed(model, smallest=1), *([] if changed else [checkpointed(model)])):
        torch.manual_seed(4)
        with context:
            found.append(computed(model, pad_batch(rows(), 0), labels_only=False))
    for own in found[1:]:
        assert_same(own, found[0], "recompute or checkpointing")
    why = repeats(model, pad_batch(rows(), 0), Engaged(), Checkpointing(recomputable(model)))
    assert ("modified by an inplace operation" in why) == changed, why


def assert_same(own: tuple[Tensor, list[Tensor]], plain: tuple[Tensor, list[Tensor]], name: str, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(own[0], plain[0], rtol=1e-9, atol=1e-9, msg=name)
    whole = torch.stack([g.norm() for g in plain[1]]).norm()
    apart = torch.stack([(a - b).norm() for a, b in zip(own[1], plain[1], strict=True)]).norm()
    assert whole > 0
    assert apart <= tolerance * whole, f"{name}: {float(apart / whole):.1e}"


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
    compare(attached(model, METHODS[method](), upstream=True), upstream=True, changed=trick in CHANGED)


@pytest.mark.parametrize("trick", TRICKS)
def test_with_frozen_layers_below(trick: str) -> None:
    model = build("llama")
    TRICKS[trick](model)
    method = byway.LoRA(rank=3, layers="1-", targets="all-linear", dropout=0.2)
    compare(attached(model, method, upstream=False), upstream=False, changed=trick in CHANGED)


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


def test_a_layer_that_draws_from_a_generator_that_is_not_restored_is_not_recomputed() -> None:
    model = build("llama")
    attached(model, byway.LoRA(rank=3, targets="all-linear"), upstream=False)
    noise = random.Random(0)
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out * noise.uniform(0.5, 1.5))
    why = repeats(model, pad_batch(rows(), 0), Engaged(), Checkpointing(recomputable(model)))
    assert why.startswith("it does not reproduce the plain loss here (in training mode")
