"""Models that change tensors in place after a norm or an activation function: recomputation gives the plain gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import byway
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.recompute import recomputed
from tests.tiny import randomize

D = 24
Change = Callable[[Tensor], Tensor]


def _masked(h: Tensor) -> Tensor:
    return h.masked_fill_(torch.arange(h.shape[-1]) % 3 == 0, 0.5)


def _part(h: Tensor) -> Tensor:
    h[..., :7] *= 1.5
    return h


def _assigned(h: Tensor) -> Tensor:
    h.view(-1, D)[0] = 0.25
    return h


def _jitter(h: Tensor) -> Tensor:
    h *= torch.empty_like(h).uniform_(0.6, 1.4)
    return h


CHANGES: dict[str, Change] = {
    "added": lambda h: h.add_(0.7),
    "masked": _masked,
    "clamped": lambda h: h.clamp_(-0.4, 0.4),
    "scaled": lambda h: h.mul_(3.0),
    "dropped": lambda h: nn.functional.dropout(h, 0.3, training=True, inplace=True),
    "part": _part,
    "assigned": _assigned,
    "jitter": _jitter,
    "activated": lambda h: nn.functional.silu(h, inplace=True),
}


class Layer(nn.Module):
    def __init__(self, norm: nn.Module, activation: nn.Module, after_norm: Change, after_activation: Change) -> None:
        super().__init__()
        self.norm, self.act = norm, activation
        self.up, self.gate, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.after_norm, self.after_activation = after_norm, after_activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.after_norm(self.norm(x))
        wide = self.after_activation(self.act(self.gate(h))) * self.up(h)
        return x + self.down(wide)


class Model(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], activation: Callable[[], nn.Module], *changes: Change) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.layers = nn.ModuleList(Layer(norm(), activation(), *changes) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Of every trained tensor and of the embedding, with the draws of one seed."""
    torch.manual_seed(3)
    loss = run()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def compare(model: nn.Module, run: Callable[[], Tensor], tolerance: float = 1e-10) -> None:
    plain = gradients(model, run)
    with recomputed(model, smallest=1):
        own = gradients(model, run)
    whole = torch.stack([g.norm() for g in plain]).norm()
    assert whole > 0
    apart = torch.stack([(a - b).norm() for a, b in zip(own, plain, strict=True)]).norm()
    assert apart <= tolerance * whole, float(apart / whole)


def built(norm: Callable[[], nn.Module], activation: Callable[[], nn.Module], *changes: Change, dropout: float = 0.2) -> Model:
    torch.manual_seed(0)
    model = Model(norm, activation, *changes).double()
    adapter = byway.attach(model, byway.LoRA(rank=3, targets=["up", "gate", "down"], dropout=dropout))
    randomize(adapter.named_parameters())
    model.embed.weight.requires_grad_()  # upstream of everything
    return model.train()


NORMS: dict[str, Callable[[], nn.Module]] = {"layer norm": lambda: nn.LayerNorm(D), "rms norm": lambda: nn.RMSNorm(D)}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "rrelu, which draws": nn.RReLU,
}
IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_norm_whose_output_is_changed_in_place(change: str, norm: str) -> None:
    model = built(NORMS[norm], nn.GELU, CHANGES[change], lambda h: h)
    compare(model, lambda: model(IDS).pow(2).sum())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("change", ["added", "clamped", "dropped", "jitter", "part"])
def test_an_activation_whose_output_is_changed_in_place(change: str, activation: str) -> None:
    def wide(h: Tensor) -> Tensor:
        return CHANGES[change](h)

    model = built(NORMS["layer norm"], ACTIVATIONS[activation], lambda h: h, wide)
    try:
        gradients(model, lambda: model(IDS).pow(2).sum())
    except RuntimeError as error:  # an operation that keeps its output forbids the change, with recomputation as well
        assert "modified by an inplace operation" in str(error)
        with recomputed(model, smallest=1), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, lambda: model(IDS).pow(2).sum())
    else:
        compare(model, lambda: model(IDS).pow(2).sum())


@pytest.mark.parametrize("norm", NORMS)
def test_an_error_of_the_plain_model_stays_an_error(norm: str) -> None:
    """The norm keeps its input, which is changed afterwards."""
    model = built(NORMS[norm], nn.GELU, lambda h: h, lambda h: h)

    def run() -> Tensor:
        x = model.embed(IDS) * 1.0
        h = model.layers[0].norm(x)
        x += 0.7
        return (model.layers[0].up(h).sum() + x.sum()).pow(2)

    for context in (torch.enable_grad(), recomputed(model, smallest=1)):
        with context, pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, run)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_adapters_dropout_that_returns_its_input_takes_no_recipe_of_another_operation(dropout: float, training: bool) -> None:
    model = built(NORMS["rms norm"], nn.SiLU, lambda h: h, lambda h: h, dropout=dropout).train(training)
    compare(model, lambda: model(IDS).pow(2).sum())


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=4, router_jitter_noise=0.4, **sizes)
    config._experts_implementation = "eager"  # the grouped product has no float64
    return MixtralForCausalLM(config).double()


def test_the_jitter_of_mixtures_of_experts() -> None:
    model = mixtral()
    adapter = byway.attach(model, byway.ParallelAdapter(reduction=8))
    randomize(adapter.named_parameters())
    model.train()
    compare(model, lambda: model(IDS).logits.pow(2).sum())


def test_the_jitter_of_switch_transformers() -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4, router_jitter_noise=0.4
    )
    model = SwitchTransformersForConditionalGeneration(config).double()
    adapter = byway.attach(model, byway.LoRA(rank=4, targets=["q", "v"], dropout=0.1))
    randomize(adapter.named_parameters())
    model.train()
    compare(model, lambda: model(input_ids=IDS, decoder_input_ids=IDS).logits.pow(2).sum())


def test_layers_that_are_checkpointed_too() -> None:
    model = mixtral()
    adapter = byway.attach(model, byway.LoRA(rank=4, targets=["q_proj"], dropout=0.2))
    randomize(adapter.named_parameters())
    model.train()
    with checkpointed(model):
        compare(model, lambda: model(IDS).logits.pow(2).sum())
