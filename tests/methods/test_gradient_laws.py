"""Laws of gradients that every method obeys: beside the frozen base, beside a quantized one, and in models that do unusual things."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway import methods
from byway.core.weights import plain
from byway.methods.lowrank.magnitude import Decomposed
from tests.methods.cases import SCALES, method_of
from tests.tiny import VOCABULARY, build, randomize

STORED = ("fp32", "bf16", "int8", "nf4", "nf4 double")
QUANTIZED = STORED[2:]
NAMES = methods.names()
AT_START = [name for name in NAMES if methods.load(name)(**({})).identity_at_start]
FAMILIES = {"no bias": "llama", "bias": "opt"}

pytestmark = pytest.mark.filterwarnings("ignore")


def stored(model: Any, how: str) -> Any:
    """The model with its inner maps stored as `how` says."""
    if how == "fp32":
        return model
    if how == "bf16":
        return model.bfloat16()
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            sizes, bias = (module.in_features, module.out_features), module.bias is not None
            if how == "int8":
                made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
            else:
                made = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compress_statistics=how.endswith("double"))
            made.load_state_dict(copy.deepcopy(module.state_dict()))
            model.set_submodule(path, made.to("cpu"))
    return model


def base(bias: str, how: str, training: bool) -> Any:
    model = build(FAMILIES[bias])
    model.config.dropout = 0.0
    for module in model.modules():
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return stored(model, how).train(training).requires_grad_(False)


def gradients(model: Any, ids: Tensor, adapter: Any = None) -> dict[str, Tensor]:
    """Of the loss with respect to the input embeddings (``""``) and to every trained tensor."""
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    own = {} if adapter is None else dict(adapter.named_parameters())
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(inputs_embeds=given, labels=ids, use_cache=False).loss.backward()
    none = torch.zeros(())
    return {"": none if given.grad is None else given.grad} | {n: none if p.grad is None else p.grad.clone() for n, p in own.items()}


@pytest.mark.covering_sample(("name", "how"), ("name", "bias"), ("how", "bias", "training"))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", FAMILIES)
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", AT_START)
def test_right_after_attach_the_input_embeddings_get_the_frozen_bases_gradient(name: str, how: str, bias: str, training: bool) -> None:
    if how in QUANTIZED and not methods.load(name).quantized_base:
        pytest.skip(f"{name} refuses a quantized base")
    model = base(bias, how, training)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = gradients(model, ids)[""].float()
    byway.attach(model, method_of(name))
    found = gradients(model, ids)[""].float()
    assert expected.norm() > 0
    assert (found - expected).norm() <= (2e-2 if how == "bf16" else 1e-5) * expected.norm()


@pytest.mark.covering_sample(("name", "how"), ("name", "bias"), ("how", "bias", "training"))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bias", FAMILIES)
@pytest.mark.parametrize("how", QUANTIZED)
@pytest.mark.parametrize("name", [name for name in NAMES if methods.load(name).quantized_base])
def test_away_from_the_start_gradients_are_those_beside_the_dequantized_base(name: str, how: str, bias: str, training: bool) -> None:
    model = base(bias, how, training)
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if (fresh := plain(module, torch.float32)) is not module:
            twin.set_submodule(path, fresh)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for one in (model, twin):
        adapter = byway.attach(one, method_of(name))
        randomize(adapter.named_parameters(), scale=SCALES.get(name, 0.1))
        results.append(gradients(one, ids, adapter))
    found, expected = results
    assert found.keys() == expected.keys()
    # 8-bit maps round their inputs as well
    tolerance = 0.1 if how == "int8" else 1e-4
    for key, value in expected.items():
        # the largest of all is the measure of a gradient that is zero but for rounding (a bias of keys)
        size = max(value.norm(), 1e-3 * max(other.norm() for other in expected.values()))
        assert (found[key] - value).norm() <= tolerance * size, key


class Identity(torch.autograd.Function):
    """y = x, a view made outside the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


class Doubled(torch.autograd.Function):
    """y = 2x, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * gradient


def jitter(module: nn.Module, args: Any) -> None:
    """As SwitchTransformers' router: noise on the input, in place."""
    args[0].mul_(torch.empty_like(args[0]).uniform_(0.9, 1.1))


def moved(module: nn.Module, args: Any, out: Tensor) -> None:
    out += 0.7


def dropped(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return nn.functional.dropout(out, 0.1, training=module.training, inplace=True)


def retained(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.retain_grad()


ODD: dict[str, dict[str, tuple[Any, ...]]] = {
    # end of a path -> hooks on its output, in this order
    "opt": {
        "self_attn_layer_norm": (moved, dropped),
        "q_proj": (lambda m, a, out: Identity.apply(out), retained),
        "fc2": (lambda m, a, out: Doubled.apply(out),),
        "fc1": (dropped,),
    },
    "gpt2": {"ln_1": (moved,), "c_attn": (lambda m, a, out: Identity.apply(out),), "c_fc": (dropped, retained), "c_proj": (moved,)},
    "bert": {"query": (lambda m, a, out: Identity.apply(out),), "value": (moved,), "intermediate.dense": (retained, dropped)},
}
JITTERED = {"opt": "fc1", "gpt2": "mlp", "bert": "attention.output.dense"}
SHARED = {
    "opt": ("model.decoder.layers.0", "model.decoder.layers.2"),
    "gpt2": ("transformer.h.0.mlp", "transformer.h.2.mlp"),
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.2"),
}


def odd(family: str) -> Any:
    """A model in float64 that changes outputs in place, has functions and hooks of its own, a shared module, noise and dropout."""
    model: Any = build(family).double().requires_grad_(False)
    if family == "opt":
        for layer in model.model.decoder.layers:
            layer.activation_fn = nn.GELU()  # differentiable everywhere
    first, second = SHARED[family]
    model.set_submodule(second, model.get_submodule(first))
    for path, module in model.named_modules():
        for end, hooks in ODD[family].items():
            if f".{path}".endswith(f".{end}"):
                for hook in hooks:
                    module.register_forward_hook(hook)
        if f".{path}".endswith(f".{JITTERED[family]}"):
            module.register_forward_pre_hook(jitter)
    return model.train()


@pytest.mark.covering_sample(("name",), ("family",), times=2)
@pytest.mark.parametrize("family", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_in_a_model_that_does_unusual_things_gradients_are_finite_differences(name: str, family: str, monkeypatch: Any) -> None:
    model = odd(family)
    # norms of what is trained are constants in the backward pass, by definition: of the frozen weight they are
    adapter = byway.attach(model, method_of(name, **({"links": ("magnitude", "low_rank")} if name == "weight_chain" else {})))
    randomize(adapter.named_parameters(), scale=SCALES.get(name, 0.1))
    for _, side in adapter.side_paths():
        if isinstance(side, Decomposed):
            norms = side.norms().detach()
            monkeypatch.setattr(side, "norms", partial(norms.view, norms.shape))
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    more = {} if family == "bert" else {"use_cache": False}

    def loss() -> Tensor:
        torch.manual_seed(5)  # the same masks and the same noise
        return model(inputs_embeds=given.clone(), **more).logits.pow(2).mean()

    wanted: dict[str, Tensor] = {"embeddings": given, **dict(adapter.named_parameters())}
    found = torch.autograd.grad(loss(), list(wanted.values()), allow_unused=True)
    draws = torch.Generator().manual_seed(2)
    for (key, tensor), gradient in zip(wanted.items(), found, strict=True):
        if key == "embeddings" and any(side.detached for _, side in adapter.side_paths()):
            continue  # a ladder reads the frozen model's states as constants, which saves its backward pass
        direction = torch.randn(tensor.shape, generator=draws, dtype=tensor.dtype) * tensor.detach().abs().mean()
        values = []
        with torch.no_grad():
            for shift in (1e-5, -2e-5):
                tensor.add_(shift * direction)
                values.append(loss())
            tensor.add_(1e-5 * direction)
        expected = (values[0] - values[1]) / 2e-5
        own = torch.zeros(()) if gradient is None else (gradient * direction).sum()
        assert (own - expected).abs() <= 1e-6 * expected.abs() + 1e-9, key
