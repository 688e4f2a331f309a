"""Chunked cross-entropy against torch's on all logits at once: loss, gradients, memory, and hooks or adapters on the
head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway
from byway.engine.loss import cross_entropy
from byway.engine.loss import tokens as loss
from byway.engine.loss.cross_entropy import LossTerms, chunk_rows, chunked_loss, summed_loss, trained_in
from byway.engine.loss.tokens import token_loss
from byway.errors import ConfigError
from byway.methods.lora import LoRA
from tests.engine.losses import TERMS, batch, by_hand, made, measured, relative
from tests.tiny import build, randomize

# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 36, 37, 100])
def test_loss_and_every_gradient_equal_torchs_in_float64(rows: int, terms: LossTerms) -> None:
    head, hidden, targets = made(seed=rows)
    hidden.requires_grad_()
    sources = [hidden, *head.parameters()]
    expected = by_hand(head(hidden), targets, terms)
    own = chunked_loss(head, hidden, targets, terms, trained=list(head.parameters()), rows=rows)
    assert own.dtype == torch.float64
    assert abs(own - expected) <= 1e-13 * expected
    for g, e in zip(torch.autograd.grad(0.37 * own, sources), torch.autograd.grad(0.37 * expected, sources), strict=True):
        assert (g - e).norm() <= 1e-13 * e.norm()


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_plain_twin_is_the_formula(terms: LossTerms) -> None:
    head, hidden, targets = made(seed=1)
    logits = head(hidden).detach()
    assert summed_loss(logits, targets, terms) == by_hand(logits, targets, terms)
    spread = torch.full_like(logits, terms.label_smoothing / 41)
    spread[torch.arange(37), targets] += 1 - terms.label_smoothing
    lse = logits.exp().sum(-1).log()
    written_out = (spread * (lse[:, None] - logits)).sum() + terms.z_loss * (lse**2).sum()
    assert abs(summed_loss(logits, targets, terms) - written_out) <= 1e-13 * written_out


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_slope_is_that_of_finite_differences(terms: LossTerms) -> None:
    head, hidden, targets = made(seed=2, n=4, d=3, v=5)
    for p in head.parameters():
        p.requires_grad_(False)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: chunked_loss(head, h, targets, terms, rows=3), (hidden,))


def test_huge_and_tiny_logits_stay_finite() -> None:
    head, hidden, targets = made(seed=3)
    for factor in (1e-30, 1e4):
        h = (factor * hidden).float().requires_grad_()
        own = chunked_loss(head.float(), h, targets, LossTerms(z_loss=1e-4), rows=7)
        expected = by_hand(head(h), targets, LossTerms(z_loss=1e-4))
        assert torch.isfinite(own) and abs(own - expected) <= 1e-6 * expected
        (g,), (e,) = torch.autograd.grad(own, h), torch.autograd.grad(expected, h)
        assert (g - e).norm() <= 1e-5 * e.norm()


def test_what_is_not_trained_gets_no_gradient_and_costs_none() -> None:
    head, hidden, targets = made(seed=4)
    head.weight.requires_grad_(False)
    seen: list[tuple[bool, bool]] = []
    head.register_forward_hook(lambda m, args, out: seen.append((args[0].requires_grad, out.requires_grad)))
    chunked_loss(head, hidden, targets, trained=[head.bias], rows=20).backward()
    assert head.weight.grad is None and head.bias.grad is not None
    assert seen == [(False, True)] * 2, "only the bias is trained: no gradient for the hidden state"
    with torch.no_grad():
        assert not chunked_loss(head, hidden.requires_grad_(), targets, trained=[head.bias], rows=20).requires_grad
    assert seen[2:] == [(False, False)] * 2
    head.bias.requires_grad_(False)
    assert not chunked_loss(head, hidden.detach(), targets, trained=[head.bias]).requires_grad


def test_two_tensors_that_are_handed_one_gradient_and_one_that_gets_none() -> None:
    head, hidden, targets = made(seed=5, n=40)
    one, other, idle = (nn.Parameter(torch.zeros(1, 10, 41, dtype=torch.float64)) for _ in range(3))

    def shifted(h: Tensor) -> Tensor:
        return head(h) + one + other  # (1, 10, 41) of a chunk: both get the same gradient

    sources = [head.bias, one, other]
    expected = torch.autograd.grad(by_hand(shifted(hidden.view(4, 10, 8)).view(40, 41), targets, LossTerms()), sources)
    own = chunked_loss(shifted, hidden, targets, trained=[*sources, idle], rows=10)
    *found, nothing = torch.autograd.grad(own, [*sources, idle], allow_unused=True)
    assert nothing is None
    assert all((g - e).norm() <= 1e-13 * e.norm() for g, e in zip(found, expected, strict=True))


def test_the_graph_can_be_kept_but_the_loss_not_be_differentiated_twice() -> None:
    head, hidden, targets = made(seed=6)
    hidden.requires_grad_()
    own = chunked_loss(head, hidden, targets, trained=list(head.parameters()), rows=10)
    (once,) = torch.autograd.grad(own, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(3 * own, hidden, retain_graph=True)
    assert (again - 3 * once).norm() <= 1e-14 * again.norm()
    with pytest.raises(ConfigError, match="differentiated once only"):
        torch.autograd.grad(own, hidden, create_graph=True)


def test_a_hook_may_keep_the_logits_that_it_was_shown() -> None:
    head, hidden, targets = made(seed=7)
    kept: list[Tensor] = []
    handle = head.register_forward_hook(lambda m, args, out: kept.append(out.detach()))
    chunked_loss(head, hidden.requires_grad_(), targets, rows=37)
    handle.remove()
    assert torch.equal(kept[0][0], head(hidden))


def test_what_is_trained_is_found_wherever_it_is_kept() -> None:
    head, elsewhere = nn.Linear(4, 6), nn.Parameter(torch.ones(6))
    head.weight.requires_grad_(False)
    out = F.gelu(head(torch.zeros(0, 4)) * elsewhere.exp()).float()
    assert {id(t) for t in trained_in(out)} == {id(elsewhere), id(head.bias)}
    assert trained_in(out.detach()) == ()


def test_a_chunk_has_its_budget_but_not_too_few_rows() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(49152, cpu) * 49152 * 4 <= cross_entropy._BUDGET["cpu"] < (chunk_rows(49152, cpu) + 1) * 49152 * 4
    assert chunk_rows(10**6, cpu) == cross_entropy._FEWEST["cpu"]
    assert chunk_rows(49152, torch.device("meta")) == chunk_rows(49152, torch.device("cuda")) > chunk_rows(49152, cpu)


# ---------------------------------------------------------------- low precision


class _Half(nn.Module):
    """A head that computes in float32 and returns another dtype, so that only the loss's own arithmetic is tested."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_as_right_as_the_plain_loss_of_them(dtype: torch.dtype, seed: int) -> None:
    """Compare the error, against the same rounded logits in float64, with that of the plain way with a scaled loss."""
    g = torch.Generator().manual_seed(seed)
    weight, hidden, targets = (
        torch.randn(3000, 16, generator=g) / 4,
        torch.randn(60, 16, generator=g),
        torch.randint(0, 3000, (60,), generator=g),
    )
    head, factor = _Half(weight, dtype), 8.0
    exact = head(hidden).double().requires_grad_()
    truth = by_hand(exact, targets, LossTerms())
    (slope,) = torch.autograd.grad(truth, exact)
    wanted = slope @ weight.double()
    errors = []
    for of in (lambda h: summed_loss(head(h), targets), lambda h: chunked_loss(head, h, targets, rows=16)):
        h = hidden.clone().requires_grad_()
        total = of(h)
        assert total.dtype == torch.float32 and abs(total - truth) <= 1e-6 * truth
        (found,) = torch.autograd.grad(factor * total, h)
        errors.append(float((found.double() / factor - wanted).norm() / wanted.norm()))
    assert errors[1] <= 1.05 * errors[0] < 1e-2


def test_float16_keeps_what_small_probabilities_give_and_small_factors() -> None:
    """A flat distribution over 40,000 tokens has p = 2.5e-5, below float16's normal range; the factor 1e-6 is below it
    too."""
    weight = torch.randn(40000, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    head = _Half(weight, torch.float16)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(4)
    own, plain = (f(hidden) for f in (lambda h: chunked_loss(head, h, targets), lambda h: summed_loss(F.linear(h, weight), targets)))
    (found,), (wanted,) = torch.autograd.grad(1e-6 * own, hidden), torch.autograd.grad(1e-6 * plain, hidden)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_float16_keeps_a_tail_whose_probabilities_are_below_its_smallest_number() -> None:
    """40,000 tokens of p = 2.5e-8 add up to 1 − p of the label: without them the gradient would be half as long."""
    weight = -1 + 0.05 * torch.randn(40000, 8, generator=torch.Generator().manual_seed(0))
    weight[7] = 1.19
    head, hidden, targets = _Half(weight, torch.float16), torch.ones(3, 8), torch.full((3,), 7)
    exact = head(hidden).double().requires_grad_()
    (slope,) = torch.autograd.grad(by_hand(exact, targets, LossTerms()), exact)
    wanted = slope @ weight.double()
    h = hidden.clone().requires_grad_()
    (found,) = torch.autograd.grad(chunked_loss(head, h, targets), h)
    assert (found - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_that_arrives_is_not_rounded_to_the_hidden_states_dtype(dtype: torch.dtype) -> None:
    """1/3 in bfloat16 is 0.2% too large, a bias of every row; other rounding errors average out."""
    g = torch.Generator().manual_seed(9)
    head = nn.Linear(64, 500, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(500, 64, generator=g) / 8)
    head = head.to(dtype)
    hidden, targets = torch.randn(200, 64, generator=g).to(dtype), torch.randint(0, 500, (200,), generator=g)
    exact = hidden.double().requires_grad_()
    (wanted,) = torch.autograd.grad(by_hand(F.linear(exact, head.weight.double()), targets, LossTerms()), exact)
    h = hidden.clone().requires_grad_()
    (found,) = torch.autograd.grad(chunked_loss(head, h, targets, rows=64), h, torch.tensor(1 / 3))
    assert found.dtype == dtype
    share = float((found.double() * wanted).sum() / wanted.square().sum())
    assert abs(3 * share - 1) < 1e-3


def test_bfloat16_errs_no_more_than_the_plain_loss_does_and_without_bias() -> None:
    """Gradients of all adapters over 20 batches, against float32 on the same rounded weights."""
    model = build("llama").bfloat16()
    adapter = byway.attach(model, LoRA(rank=4, targets=["q_proj", "down_proj", "lm_head"]))
    randomize(adapter.named_parameters())
    twin = build("llama")
    randomize(byway.attach(twin, LoRA(rank=4, targets=["q_proj", "down_proj", "lm_head"])).named_parameters())
    twin.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    squares, signed, losses = {True: 0.0, False: 0.0}, {True: [], False: []}, []
    for number in range(20):
        given = batch(seed=100 + number)
        exact, wanted = measured(twin, given, labels_only=False)
        reference = torch.cat([g.flatten() for g in wanted])
        for labels_only in (True, False):
            own, found = measured(model, given, labels_only=labels_only)
            error = torch.cat([g.float().flatten() for g in found]) - reference
            squares[labels_only] += float(error.square().sum() / reference.square().sum())
            signed[labels_only].append(float(error @ reference / reference.square().sum()))
            if labels_only:
                losses.append(float((own - exact) / exact))
    assert squares[True] <= 1.05 * squares[False]
    for errors in (signed[True], losses):
        values = torch.tensor(errors)
        assert abs(values.mean()) <= 3.2 * values.std() / len(values) ** 0.5, "a mean this far from zero is no chance (0.5%)"


def test_under_autocast_the_head_computes_in_half_precision_as_it_does_plainly(small_chunks: None) -> None:
    model = build("qwen2")
    randomize(byway.attach(model, LoRA(rank=3, targets=["v_proj", "lm_head"])).named_parameters())
    exact, wanted = measured(model, batch(), labels_only=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {labels_only: measured(model, batch(), labels_only=labels_only) for labels_only in (True, False)}
    assert abs(found[True][0] - found[False][0]) <= 1e-3 * exact
    assert 1e-4 < relative(found[True][1], wanted) <= 1.1 * relative(found[False][1], wanted)


class _Exact(torch.autograd.Function):
    """A product without autocast in its forward pass, whose backward pass multiplies float32 matrices."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        hidden, weight = given
        ctx.save_for_backward(weight)
        with torch.autocast("cpu", enabled=False):
            return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.saved_tensors[0], None


def test_autocast_does_not_reach_into_the_heads_own_backward() -> None:
    head, hidden, targets = made(seed=11)
    weight, hidden = head.weight.detach().float(), hidden.float().requires_grad_()
    found = []
    for of in (
        lambda h: chunked_loss(lambda part: _Exact.apply(part, weight), h, targets, rows=9),
        lambda h: summed_loss(h @ weight.T, targets),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=len(found) == 0):
            total = of(hidden)
        found.append(torch.autograd.grad(total, hidden)[0])
    assert (found[0] - found[1]).norm() <= 1e-6 * found[1].norm()


def test_only_what_is_trained_on_the_head_is_asked_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    byway.attach(model, LoRA(rank=2, targets=["q_proj", "lm_head"]))
    asked: list[Tensor] = []

    def spy(*given: Any, trained: tuple[Tensor, ...], **options: Any) -> Tensor:
        asked.extend(trained)
        return chunked_loss(*given, trained=trained, **options)

    monkeypatch.setattr(loss, "chunked_loss", spy)
    token_loss(model, batch(), labels_only=True)
    assert {id(t) for t in asked} == {id(p) for p in model.lm_head.parameters() if p.requires_grad} and len(asked) == 2
