"""Subclasses of nn.Linear whose forward returns something other than one tensor: left out of ``all-linear`` by name, refused when named."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import byway
from byway.core.weights import odd_output
from tests.tiny import LAYERS


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        scores = super().forward(input)
        return scores.topk(1).indices, scores


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : self.out_features // 2]


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Gated(nn.Linear):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return gate * super().forward(input)


class Model(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(8, 8), router, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.router(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("kind", [Router, Halved])
def test_left_out_of_all_linear_with_a_note_and_refused_when_named(kind: type[nn.Linear]) -> None:
    model = Model(kind(8, 4))
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear"))
    assert [site.path for site, _ in adapter.side_paths()] == ["first", "last"]
    assert any(kind.__name__ in note and "router" in note for note in adapter.notes)
    model(torch.randn(3, 8))
    byway.detach(model)
    with pytest.raises(byway.TargetError, match=rf"'router' \({kind.__name__}\): its forward returns"):
        byway.attach(model, byway.LoRA(rank=2, targets=["first", "router"]))


def test_a_subclass_that_returns_one_tensor_is_adapted() -> None:
    torch.manual_seed(0)
    for module in (Scaled(8, 8), nn.Linear(8, 8)):
        adapter = byway.attach(Model(module), byway.LoRA(rank=2, targets="all-linear"))
        assert len(adapter.side_paths()) == 3
    assert odd_output(Gated(8, 4)) == "", "a forward with further arguments cannot be tried"


def linear_classes() -> list[type[nn.Linear]]:
    """Every subclass of nn.Linear in transformers' model files."""
    found: dict[str, type[nn.Linear]] = {}
    for info in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".modeling_" not in info.name:
            continue
        spec = importlib.util.find_spec(info.name)
        assert spec is not None and spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            if "(nn.Linear)" not in file.read():
                continue
        module = importlib.import_module(info.name)
        found |= {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, nn.Linear) and c.__module__ == info.name}
    return list(found.values())


def test_which_of_transformers_linear_classes_return_one_tensor() -> None:
    """Those that a low-rank branch can stand beside are told from the others; a new class shows up here."""
    config = type(
        "Config",
        (),
        dict.fromkeys(["hidden_size", "num_local_experts", "num_experts_per_tok"], 8)
        | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    )()
    answers: dict[str, bool] = {}
    for kind in linear_classes():
        first = list(inspect.signature(kind.__init__).parameters)[1]
        if kind.__name__ == "DeepseekV4GroupedLinear":
            module = kind(8, 8, n_groups=2)  # type: ignore[call-arg]
        elif kind.__name__ == "IdeficsDecoupledLinear":
            module = kind(8, 8, 0)  # type: ignore[call-arg]
        else:
            module = kind(config) if first == "config" else kind(8, 8)  # type: ignore[arg-type, call-arg]
        answers[kind.__name__] = odd_output(module) == ""
    assert answers == {
        "DeepseekV4GroupedLinear": False,
        "EsmFoldLinear": True,
        "FalconLinear": True,
        "IdeficsDecoupledLinear": True,
        "Llama4Router": False,
        "PhimoeTopKRouter": False,
    }


@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_a_mixture_of_experts_whose_router_is_a_linear_class_is_adapted_and_runs(family: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "llama4":
        config: Any = transformers.Llama4TextConfig(**sizes, head_dim=8, intermediate_size_mlp=64)
        model: Any = transformers.Llama4ForCausalLM(config).eval()
    else:
        config = transformers.PhimoeConfig(**sizes | {"num_experts_per_tok": 2})
        model = transformers.PhimoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    ids = torch.randint(3, 97, (2, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear"))
    assert any("Router" in note for note in adapter.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
