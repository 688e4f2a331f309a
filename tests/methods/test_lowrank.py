"""What a low-rank branch adds is written into the base's output: the same function as the plain sum, in values and all derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.methods.lowrank.sides import AddLowRank, LinearLoRA
from tests.tiny import build, inputs, randomize


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    b, t, i, o, r = (int(torch.randint(1, high, (), generator=g)) for high in (4, 6, 9, 9, 5))
    tensors = [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in ((b, t, o), (b, t, i), (r, i), (o, r))]
    return (*tensors, 0.7)


def plain(*given: Any) -> Tensor:
    out, x, a, b, scale = given
    return out + (x @ a.T * scale) @ b.T


def written(*given: Any) -> Tensor:
    out, *rest = given
    return AddLowRank.apply(out * 1.0, *rest)  # a tensor of its own: a leaf cannot be written to


@pytest.mark.parametrize("number", range(5))
def test_values_and_gradients_of_first_and_second_order(number: int, seed: int) -> None:
    arguments = drawn(seed + number)
    torch.testing.assert_close(written(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(written, arguments)
    assert torch.autograd.gradgradcheck(written, arguments)


@pytest.mark.parametrize("fixed", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2)])
def test_what_needs_no_gradient_gets_none(fixed: tuple[int, ...], seed: int) -> None:
    *tensors, scale = drawn(seed)
    tensors = [t.detach().requires_grad_(place not in fixed) for place, t in enumerate(tensors)]
    wanted = [t for t in tensors if t.requires_grad]
    own, expected = (torch.autograd.grad(f(*tensors, scale).pow(2).sum(), wanted) for f in (written, plain))
    torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_a_plain_map_is_written_to_and_not_copied(bias: bool, seed: int) -> None:
    base = nn.Linear(6, 5, bias=bias)
    byway.attach(nn.Sequential(base), byway.LoRA(rank=2, targets=["0"]))
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    out = base(x)
    assert out._base is not None and out._base.grad_fn is not None
    assert out._base.grad_fn.name() == "AddLowRankBackward"


@pytest.mark.parametrize("order", [("lora", "ia3"), ("ia3", "lora")])
def test_beside_a_side_path_that_keeps_the_output_for_its_own_gradient(
    order: tuple[str, str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"lora": byway.LoRA(rank=3, targets="all-linear"), "ia3": byway.IA3()}

    def gradients() -> list[Tensor]:
        model = build("llama", seed)
        found = []
        for name in order:
            adapter = byway.attach(model, methods[name], name)
            randomize(adapter.named_parameters(), seed)
            found += [p for _, p in adapter.named_parameters()]
        return list(torch.autograd.grad(model(**inputs("llama")).logits.pow(2).sum(), found))

    own = gradients()
    monkeypatch.setattr(LinearLoRA, "add", LinearLoRA.__mro__[1].add)  # the plain sum
    for got, expected in zip(own, gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_no_further_from_float64_than_the_plain_sum(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    exact = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((64, 48), (64, 32), (4, 32), (48, 4))]
    half = [t.bfloat16() for t in exact]
    reference = plain(*(t.double() for t in half), 0.5)
    errors = [(f(*half, 0.5).double() - reference).pow(2).mean().sqrt() for f in (written, plain)]
    assert errors[0] <= 1.05 * errors[1]
