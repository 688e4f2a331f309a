"""The gradient that reaches what lies before an adapted map: with the update at zero it is the bare base's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import byway
from tests.tiny import VOCABULARY, build, qwen2

WIDTH = 64
QUANTIZERS = ("nf4", "nf4-double", "int8")


class Reversed(torch.autograd.Function):
    """y = x; the gradient changes its sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -gradient


class Same(Reversed):
    """The same, but returns its very input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x


class Viewed(Reversed):
    """The same, by another way to make a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view(x.shape)


class SameLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Same.apply(super().forward(input))


class ViewedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Viewed.apply(super().forward(input))


class RecomputedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(super().forward, input, use_reentrant=False)  # type: ignore[return-value]


class SplitLinear(nn.Linear):
    """Returns part of a larger tensor."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return torch.cat([out, out.tanh()], dim=-1)[..., : self.out_features]


class ReversedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Reversed.apply(super().forward(input))


class CheckpointedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(super().forward, input, use_reentrant=True)  # type: ignore[return-value]


class KeepingLinear(nn.Linear):
    """Keeps what it returned, as a cache would."""

    kept: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


def reversing_hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return Reversed.apply(out)


def doubling_tensor_hook(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda gradient: 2 * gradient)


def quantized_linear(how: str, bias: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    source = nn.Linear(WIDTH, WIDTH, bias=bias)
    if how == "int8":
        made = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=bias, quant_type="nf4", compress_statistics=how.endswith("double"))
    made.load_state_dict(source.state_dict())
    return made.to("cpu")


def hooked(hook: Callable[..., Any]) -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.register_forward_hook(hook)
    return linear


MAPS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "reversed": lambda: ReversedLinear(WIDTH, WIDTH),
    "reversed, the input returned": lambda: SameLinear(WIDTH, WIDTH),
    "reversed, a view returned": lambda: ViewedLinear(WIDTH, WIDTH),
    "checkpointed without reentry": lambda: RecomputedLinear(WIDTH, WIDTH),
    "part of a larger tensor": lambda: SplitLinear(WIDTH, WIDTH),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "checkpointed": lambda: CheckpointedLinear(WIDTH, WIDTH),
    "keeping": lambda: KeepingLinear(WIDTH, WIDTH),
    "hook that returns another tensor": lambda: hooked(reversing_hook),
    "hook on the output tensor": lambda: hooked(doubling_tensor_hook),
    "hook that retains the gradient": lambda: hooked(lambda m, a, out: out.retain_grad() if out.requires_grad else None),
    **{
        f"{how}{' with bias' if bias else ''}": (lambda how=how, bias=bias: quantized_linear(how, bias))
        for how in QUANTIZERS
        for bias in (True, False)
    },
}
SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (6,), ())
"""Of what comes before the features; bitsandbytes takes no input of one dimension."""
CASES = [(kind, shape) for kind in MAPS for shape in SHAPES if shape or not kind.startswith(QUANTIZERS)]
METHODS = {"lora": byway.LoRA(rank=4, targets=["1"]), "adalora": byway.AdaLoRA(targets=["1"])}


def backward_hook(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if gradient is None else 3 * gradient for gradient in inputs)


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """By ``backward``: a checkpoint that is reentrant refuses ``autograd.grad``."""
    for tensor in wanted:
        tensor.grad = None
    loss.backward()
    return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone() for tensor in wanted]


class Model(nn.Sequential):
    """A trained map before the adapted one, and something that is not linear after it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh().pow(2).sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_right_after_attach_the_input_gets_the_gradient_of_the_bare_map(
    kind: str, shape: tuple[int, ...], training: bool, method: str, seed: int
) -> None:
    torch.manual_seed(seed)
    adapted = MAPS[kind]()
    model = Model(nn.Identity(), adapted).train(training)
    x = torch.randn(*shape, WIDTH, requires_grad=True)
    (expected,) = gradients(model(x), [x])
    assert expected.abs().max() > 0
    adapter = byway.attach(model, METHODS[method])
    (found,) = gradients(model(x), [x])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # away from zero: the adapted map must do what map + s·BA, written out, does
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted: list[Tensor] = [x, *(p for _, p in adapter.named_parameters())]
    found = gradients(model(x), wanted)
    (_, side), *_ = adapter.side_paths()
    with byway.disabled(model):
        out = adapted(x)
        expected = gradients((out + plain_update(side, x)).tanh().pow(2).sum(), wanted)
    for own, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hook", ["first", "last", "pre", "backward", "every module"])
def test_hooks_registered_after_attach_see_what_they_would_of_a_sum_that_is_not_in_place(hook: str, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(WIDTH, WIDTH, bias=bias)
    model, x = Model(nn.Identity(), linear), torch.randn(3, WIDTH, requires_grad=True)
    adapter = byway.attach(model, METHODS["lora"])
    ((_, side),) = adapter.side_paths()
    with torch.no_grad():
        side.get_parameter("lora_B").normal_()
    handle = {
        "first": lambda: linear.register_forward_hook(reversing_hook, prepend=True),
        "last": lambda: linear.register_forward_hook(reversing_hook),
        "pre": lambda: linear.register_forward_pre_hook(lambda m, a: (Reversed.apply(a[0]),)),
        "backward": lambda: linear.register_full_backward_hook(backward_hook),
        "every module": lambda: nn.modules.module.register_module_forward_hook(
            lambda m, a, out: reversing_hook(m, a, out) if m is linear else None
        ),
    }[hook]()
    try:
        found = gradients(model(x), [x, *side.parameters()])
        twin = copy.deepcopy(linear)
        twin._modules.clear()

        def plain(given: Tensor) -> Tensor:
            return nn.functional.linear(given, twin.weight, twin.bias)

        outer = {
            "first": lambda: Reversed.apply(plain(x)) + plain_update(side, x),
            "every module": lambda: Reversed.apply(plain(x)) + plain_update(side, x),
            "last": lambda: Reversed.apply(plain(x) + plain_update(side, x)),
            "pre": lambda: plain(y := Reversed.apply(x)) + plain_update(side, y),
            "backward": lambda: plain(x) + plain_update(side, x),
        }[hook]()
        expected = gradients(outer.tanh().pow(2).sum(), [x, *side.parameters()])
        if hook == "backward":
            expected[0] = 3 * expected[0]
    finally:
        handle.remove()
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_torch_func_differentiates_an_adapted_model(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    adapter = byway.attach(model, byway.LoRA(rank=2, targets=["0", "2"]))
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.normal_()
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).pow(2).sum(), [x])
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).pow(2).sum())(x.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], model(x))


def plain_update(side: Any, x: Tensor) -> Tensor:
    hidden = x @ side.lora_A.T
    if "lora_E" in dict(side.named_parameters()):
        hidden = hidden * side.lora_E.flatten()
        return hidden @ side.lora_B.T * side.scale
    return hidden @ side.lora_B.T * side.scale


def test_what_a_module_keeps_of_its_output_is_not_changed(seed: int) -> None:
    torch.manual_seed(seed)
    seen: list[Tensor] = []
    for module in (KeepingLinear(8, 8), nn.Linear(8, 8)):
        module.register_forward_hook(lambda m, a, out: seen.append(out))
        model = nn.Sequential(module)
        adapter = byway.attach(model, byway.LoRA(rank=2, targets=["0"]))
        with torch.no_grad():
            for _, parameter in adapter.named_parameters():
                parameter.fill_(0.3)
            x = torch.randn(2, 3, 8)
            out = model(x)
            with byway.disabled(model):
                bare = model(x)
        torch.testing.assert_close(seen[-2], bare, rtol=0, atol=0)
        assert (out - bare).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", QUANTIZERS)
def test_the_embeddings_of_a_quantized_qwen2_get_the_bases_gradient(how: str, training: bool, seed: int) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'byway[quant]'")
    torch.manual_seed(seed)
    model: Any = qwen2()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            with torch.no_grad():
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
            bias = module.bias is not None
            if how == "int8":
                made = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=bias, has_fp16_weights=False)
            else:
                made = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=bias, quant_type="nf4", compress_statistics=how.endswith("double")
                )
            made.load_state_dict(copy.deepcopy(module.state_dict()))
            model.set_submodule(path, made.to("cpu"))
    model.train(training)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    embeddings = model.get_input_embeddings()(ids).detach()

    def gradient() -> Tensor:
        given = embeddings.clone().requires_grad_()
        loss = model(inputs_embeds=given, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, [given])[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gradient()
        byway.attach(model, byway.LoRA(rank=4, targets="all-linear"))
        found = gradient()
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_the_embeddings_of_a_plain_model_get_the_bases_gradient(family: str) -> None:
    model = build(family)
    ids = torch.arange(3, 12)[None]
    embeddings = model.get_input_embeddings()(ids).detach()

    def gradient() -> Tensor:
        given = embeddings.clone().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=given, labels=ids, use_cache=False).loss, [given])[0]

    expected = gradient()
    byway.attach(model, byway.LoRA(rank=4, targets="all-linear"))
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-6)
