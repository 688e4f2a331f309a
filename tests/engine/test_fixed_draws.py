"""Within FixedDraws a token gets the same values wherever it stands, whatever draws them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from byway.engine.fixed_draws import FixedDraws

SHARE = 0.3
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, SHARE),
    "dropout in place": lambda x: F.dropout(x.clone(), SHARE, True, True),
    "torch.dropout": lambda x: torch.dropout(x, SHARE, True),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + torch.randn(x.shape),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "normal_": lambda x: x * x.new_empty(x.shape).normal_(1.0, 0.1),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(SHARE),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, SHARE)),
    "exponential_": lambda x: x - torch.empty_like(x).exponential_().log(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_for_a_token_does_not_depend_on_the_layout(name: str) -> None:
    draw, x = DRAWS[name], torch.linspace(0.5, 1.5, 6 * 64).view(2, 3, 64)
    with FixedDraws():
        padded, packed = draw(x), draw(x.view(1, 6, 64))
    torch.testing.assert_close(packed.view_as(padded), padded, rtol=0, atol=0)
    assert not torch.equal(padded, x), "something is drawn"
    assert padded.isfinite().all()
    assert not torch.equal(draw(x), draw(x)), "outside it is drawn anew"


def test_zeros_are_drawn_as_often_as_asked() -> None:
    x = torch.ones(2, 3, 4000)
    with FixedDraws():
        for name in ("dropout", "torch.dropout"):
            assert abs(float((DRAWS[name](x) == 0).double().mean()) - SHARE) < 0.03
        for name in ("bernoulli", "bernoulli_"):
            assert abs(float(DRAWS[name](x).double().mean()) - SHARE) < 0.03
