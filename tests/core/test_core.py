"""The core's own laws, on any nn.Module: names, switching, scopes, several roots, dead sites, refusals that leave no trace."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SLOT, SidePath, Site
from byway.methods.lora import LoRA
from tests.tiny import build, inputs, randomize


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))


class Shift(SidePath):
    """x + a before, y + b after."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(inside))
        self.b = nn.Parameter(torch.ones(outside))

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(inputs))
        return {**inputs, name: inputs[name] + self.a}

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + self.b


@dataclass(frozen=True, kw_only=True)
class ToyShift(Method):
    paths: tuple[str, ...] = ("0",)
    identity_at_start = False

    def plan(self, model: nn.Module) -> Placement:
        return Placement([Site(path, model.get_submodule(path)) for path in self.paths])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        sizes = {"0": (6, 8), "2": (8, 8), "3": (8, 3), "": (6, 3)}
        return Shift(*sizes[site.path])


def test_any_module_also_a_sequential_root_and_a_sequential_site() -> None:
    model, x = mlp(), torch.randn(4, 6)
    bare = model(x)
    byway.attach(model, ToyShift(paths=("", "0", "2", "3")))
    first = torch.nn.functional.linear(x + 1 + 1, model[0].weight, model[0].bias) + 1
    second = torch.tanh(torch.nn.functional.linear(torch.relu(first) + 1, model[2][0].weight, model[2][0].bias)) + 1
    expected = torch.nn.functional.linear(second + 1, model[3].weight, model[3].bias) + 1 + 1
    assert torch.allclose(model(x), expected, atol=1e-6)
    byway.detach(model)
    assert torch.equal(model(x), bare)
    assert len(model) == 4


def test_positional_and_keyword_arguments_reach_a_side_path_by_name() -> None:
    seen: list[dict[str, Any]] = []

    class Spy(SidePath):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
            seen.append(dict(inputs))
            return inputs

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(1, 1)

        def forward(self, a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> tuple[Any, ...]:
            return a, b, rest, c, more

    @dataclass(frozen=True, kw_only=True)
    class Spying(Method):
        def plan(self, model: nn.Module) -> Placement:
            return Placement([Site("", model)])

        def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
            return Spy()

    model = Three()
    byway.attach(model, Spying())
    assert model(1, 5, 6, 7, c=8, d=9) == (1, 5, (6, 7), 8, {"d": 9})
    assert model(b=4, a=1) == (1, 4, (), 3, {})
    assert seen == [{"a": 1, "b": 5, "*": (6, 7), "c": 8, "d": 9}, {"b": 4, "a": 1}]


def test_activate_leaves_exactly_the_named_in_attach_order() -> None:
    model, x = build("llama"), inputs("llama")
    outs = {}
    for seed, name in enumerate(("a", "b")):
        randomize(byway.attach(model, LoRA(rank=2), name=name).named_parameters(), seed=seed)
    for names in ([], ["a"], ["b"], ["a", "b"]):
        byway.activate(model, names)
        outs[tuple(names)] = model(**x).logits.detach()
    byway.activate(model, ["b", "a"])
    assert torch.equal(model(**x).logits, outs["a", "b"])
    with byway.disabled(model):
        assert torch.equal(model(**x).logits, outs[()])
    byway.detach(model, "b")
    assert torch.equal(model(**x).logits, outs[("a",)])
    assert list(byway.adapters(model)) == ["a"]
    assert all(p.requires_grad == (SLOT in n) for n, p in model.named_parameters())


def test_disabling_is_seen_by_this_thread_only() -> None:
    model, x = build("llama"), inputs("llama")
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    adapted = model(**x).logits.detach()
    found: list[Tensor] = []
    with byway.disabled(model):
        worker = threading.Thread(target=lambda: found.append(model(**x).logits.detach()))
        worker.start()
        worker.join()
        assert not torch.equal(model(**x).logits, adapted)
    assert torch.equal(found[0], adapted)


def test_two_roots_on_one_model_and_a_wrapper_around_it() -> None:
    model, x = build("llama"), inputs("llama")
    bare, flags = model(**x).logits.detach(), [p.requires_grad for p in model.parameters()]
    outer = byway.attach(model, LoRA(rank=2, targets=["q_proj"]), name="outer")
    inner = byway.attach(model.model, LoRA(rank=2, targets=["v_proj"]), name="inner")
    randomize([*outer.named_parameters(), *inner.named_parameters()])
    assert {n for _, n, _ in byway.side_paths(model)} == {"outer", "inner"}
    assert list(byway.adapters(model)) == ["outer"]
    assert list(byway.adapters(nn.ModuleDict({"wrapped": model}))) == ["outer", "inner"]
    byway.detach(model.model, "inner")
    byway.detach(model, "outer")
    assert torch.equal(model(**x).logits, bare)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_dead_site_is_named_at_the_first_forward_and_an_unused_branch_is_no_error() -> None:
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention["a"]
            self.unused = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x = Net(), torch.randn(1, 3, 8)
    byway.attach(model, LoRA(rank=2, targets=["unused.0"]), name="unused")
    model(x)
    byway.attach(model, ToyOut(), name="dead")
    with pytest.raises(byway.TargetError, match=r"attention\.out_proj.* is never called"):
        model(x)
    byway.detach(model, "dead")
    model(x)


@dataclass(frozen=True, kw_only=True)
class ToyOut(Method):
    def plan(self, model: nn.Module) -> Placement:
        return Placement([Site("attention.out_proj", model.get_submodule("attention.out_proj"))])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return Shift(8, 8)


def test_counting_hooks_are_gone_once_every_site_has_run() -> None:
    model, x = build("llama"), inputs("llama")
    byway.attach(model, LoRA(rank=2, targets=["q_proj"]))
    before = sum(len(m._forward_hooks) for m in model.modules())
    model(**x)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 3  # one `after` for each adapted map
    assert before > 3


@pytest.mark.parametrize("name", ["", "a.b", "-x", "a/b", "x" * 65, "ä", "a+1"])
def test_a_name_that_could_not_be_a_directory_is_refused(name: str) -> None:
    with pytest.raises(byway.AdapterError, match="not allowed"):
        byway.attach(mlp(), ToyShift(), name=name)


def test_what_is_refused_leaves_the_model_untouched() -> None:
    model = build("bert")
    byway.attach(model, LoRA(rank=2), name="a")
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    refused = [
        (lambda: byway.attach(model, LoRA(rank=2), name="a"), "already attached"),
        (lambda: byway.attach(model, LoRA(rank=2), name="b"), "replaces the output of 'classifier'"),
        (lambda: byway.attach(model, LoRA(rank=2, targets=["qeury"]), name="b"), "query"),
        (lambda: byway.attach(model, LoRA(rank=2, modules_to_save=["clasifier"]), name="b"), "classifier"),
        (lambda: byway.detach(model, "b"), "no adapter named 'b'"),
        (lambda: byway.merge(model, "b"), "no adapter named 'b'"),
        (lambda: byway.activate(model, ["a", "c"]), "no adapter named 'c'"),
    ]
    for action, message in refused:
        with pytest.raises(byway.BywayError, match=message):
            action()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert list(byway.adapters(model)) == ["a"]


def test_a_merge_that_would_not_be_finite_leaves_the_base_bit_identical() -> None:
    model = build("llama")
    adapter = byway.attach(model, LoRA(rank=2))
    randomize(adapter.named_parameters())
    before = {k: v.clone() for k, v in byway.base_state_dict(model).items()}
    last = list(adapter.named_parameters())[-1][1]
    with torch.no_grad():
        last[0, 0] = float("nan")
    with pytest.raises(byway.AdapterError, match="not finite"):
        byway.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in byway.base_state_dict(model).items())


def test_merging_one_of_two_keeps_the_other_and_the_order_does_not_matter() -> None:
    def model_with_both() -> nn.Module:
        model = build("llama")
        for seed, name in enumerate(("a", "b")):
            randomize(byway.attach(model, LoRA(rank=2), name=name).named_parameters(), seed=seed)
        return model

    x = inputs("llama")
    expected = model_with_both()(**x).logits
    for order in (("a", "b"), ("b", "a")):
        model = model_with_both()
        for name in order:
            byway.merge(model, name)
            assert (model(**x).logits - expected).norm() / expected.norm() < 1e-5


def test_a_module_whose_copy_answers_counts_once_in_the_share() -> None:
    """All tensors trained in full are all parameters of the model, not half of twice as many."""
    model = build("llama")
    whole = sum(p.numel() for p in model.parameters())
    adapter = byway.attach(model, byway.Full())
    assert adapter.num_parameters == whole and ", 0 frozen (100.000%)" in adapter.summary()
    model = build("llama")
    adapter = byway.attach(model, byway.Full(targets=["q_proj"]))
    assert f"{whole - adapter.num_parameters:,} frozen" in adapter.summary()


def test_summary_points_out_uneven_coverage() -> None:
    model = build("llama")
    text = byway.attach(model, LoRA(rank=2, targets=["q_proj", "v_proj"], layers=[0, 2])).summary()
    assert "2/3" in text
    assert "model.layers.1.self_attn.q_proj" in text
    assert f"{2 * 2 * (32 + 32) + 2 * 2 * (32 + 16):,} trainable parameters" in text


def test_a_start_that_is_subtracted_survives_saving_and_loading(tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, LoRA(rank=20, targets=["q_proj"], init="pissa"))
    randomize(adapter.named_parameters(), scale=0.05)
    out = model(**x).logits
    adapter.save(tmp_path / "a")
    other = build("llama")
    byway.load(other, tmp_path / "a")  # a plain LoRA of rank 40, more than the 32 that the map has
    assert (other(**x).logits - out).norm() / out.norm() < 1e-5


def test_parameters_live_where_the_module_lives_and_are_float32_beside_a_bfloat16_base() -> None:
    model = build("llama").to(torch.bfloat16)
    adapter = byway.attach(model, LoRA(rank=2))
    assert {p.dtype for _, p in adapter.named_parameters()} == {torch.float32}
    assert model(**inputs("llama")).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rnak": 3}, "did you mean 'rank'"),
        ({"lora_alpha": 16}, "called 'alpha' here"),
        ({"r": 8}, "'rank'"),
        ({"zzz": 1}, "it has: alpha"),
    ],
)
def test_a_field_that_a_method_does_not_have_is_answered_with_the_one_that_was_meant(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(byway.ConfigError, match="LoRA has no field") as caught:
        byway.LoRA(**fields)
    assert says in str(caught.value)
