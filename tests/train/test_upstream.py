"""A run is refused if its adapter changes no output but the gradient of what lies below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site
from byway.core.targets.resolve import resolve
from byway.core.weights import is_linear
from byway.engine.loss.tokens import token_loss
from byway.errors import TargetError
from byway.train.levers.prove import at_work
from byway.train.mode import training_mode
from byway.train.upstream import compare_upstream
from tests.tiny import build
from tests.train.conftest import RecipeMaker


class _Cut(SidePath):
    """y = f(x) + g·x, g = 0, without the gradient of f(x) or of the part `lost` of it."""

    def __init__(self, lost: float) -> None:
        super().__init__()
        self.lost = lost
        self.gain = nn.Parameter(torch.zeros(1))

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        kept = out.detach() + (1 - self.lost) * (out - out.detach())
        return kept + self.gain * out


@dataclass(frozen=True, kw_only=True)
class Cut(Method):
    """A method that cuts the graph."""

    targets: Sequence[str] = ("layers.1.mlp.down_proj",)
    lost: float = 1.0

    def plan(self, model: nn.Module) -> Placement:
        return Placement(resolve(model, list(self.targets), accepts=is_linear), [])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return _Cut(self.lost)


sys.modules["cutting"] = sys.modules[__name__]


def recipe_of(make_recipe: RecipeMaker, **method: Any) -> dict[str, Any]:
    return make_recipe() | {"method": {"name": "cutting:Cut", **method}}


@pytest.mark.parametrize("lost", [1.0, 0.05])
def test_an_adapter_that_cuts_the_gradient_is_refused_with_the_layer(lost: float, make_recipe: RecipeMaker) -> None:
    recipe = recipe_of(make_recipe, lost=lost)
    with pytest.raises(TargetError, match=r"the gradient that reaches model\.embed_tokens is off by .* it is lost in model\.layers\.1"):
        byway.train(recipe)
    assert not Path(recipe["output"]).exists()


def test_one_that_passes_it_trains(make_recipe: RecipeMaker) -> None:
    recipe = recipe_of(make_recipe, lost=0.0)
    recipe["train"] |= {"max_steps": 1}
    byway.train(recipe)


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_embeddings_that_the_model_changes_in_place_are_compared_too(lost: float) -> None:
    model = build("llama")
    model.get_submodule("model.layers.0").register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5), *args[1:]))
    byway.attach(model, Cut(lost=lost))
    ids = torch.arange(3, 19).view(2, 8)
    found = compare_upstream(model, token_loss, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert ("it is lost in model.layers.1" in found) == (lost > 0), found


def test_running_statistics_of_the_base_are_left_alone() -> None:
    model = build("llama")
    norms = [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
    model.extra = nn.ModuleList(norms)
    with at_work(model):
        assert model.training
        assert not any(norm.training for norm in norms)
    model.train()
    training_mode(model)
    assert not any(norm.training for norm in norms)


def test_doctor_refuses_it_too(make_recipe: RecipeMaker) -> None:
    from byway.train.doctor import diagnose

    with pytest.raises(TargetError, match="the gradient that reaches"):
        diagnose(byway.Recipe.from_dict(recipe_of(make_recipe)))
