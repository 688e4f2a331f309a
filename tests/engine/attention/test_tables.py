"""Attention in tables equals one call per document, forward and backward, with and without dropout."""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byway.core.attention import Call
from byway.data.collate import pack_labelled, pad_labelled
from byway.engine.attention import tables as short_documents
from byway.engine.attention.packing import packing
from byway.engine.attention.tables import LONGEST, attended, suits
from tests.engine.attention.test_packing_rows import DECODERS, ENCODERS, adapted, assert_equal, classifier, examples, measured

SEED = int(os.environ.get("BYWAY_SEED", "0"))


def drawn(heads: int, lengths: list[int], size: int, value_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(SEED)
    sizes = (size, size, value_size or size)
    q, k, v = (torch.randn(heads, sum(lengths), e, generator=g, dtype=torch.float64).requires_grad_() for e in sizes)
    return q, k, v


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, causal: bool) -> Tensor:
    parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale) for a, b, c in parts], dim=1)


def draws(count: int) -> list[int]:
    print(f"seed {SEED}")
    return [random.Random(f"{SEED} {i}").randint(1, LONGEST) for i in range(count)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 1], [5, 60, 1, 7, 7, 33, 2], draws(40)], ids=["equal", "ones", "mixed", "many"])
def test_tables_equal_one_call_per_document(lengths: list[int], causal: bool) -> None:
    states = drawn(3, lengths, 8, 6)
    weights = torch.randn(3, sum(lengths), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for out in (
        attended(*states, lengths, scale=0.3, causal=causal, dropout=0.0),
        one_by_one(*states, lengths, scale=0.3, causal=causal),
    ):
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), states)))
    for own, plain in zip(*found, strict=True):
        assert torch.allclose(own, plain, rtol=1e-10, atol=1e-12)


def test_the_gradient_under_dropout_is_that_of_the_same_masks() -> None:
    lengths = [4, 1, 6, 3, 5]
    states = drawn(2, lengths, 4)

    def function(*given: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return attended(*given, lengths, scale=0.5, causal=False, dropout=0.4)

    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(function, states)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    lengths = [16] * 40
    q, k, v = drawn(4, lengths, 4)
    ones = torch.ones_like(v)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        kept = torch.stack([attended(q * 0, k, ones, lengths, scale=1.0, causal=False, dropout=0.25).detach() for _ in range(20)])
    # 16 equal weights, each kept with probability 3/4 and scaled by 4/3
    assert kept.mean() == pytest.approx(1.0, abs=5 * (1 / 3 / 16) ** 0.5 / kept[..., 0].numel() ** 0.5)
    assert kept[..., 0].var() == pytest.approx(1 / 3 / 16, rel=0.05)


def test_tables_waste_little_and_there_are_few() -> None:
    lengths = draws(64)
    groups, back = short_documents._grouped(lengths, torch.device("cpu"))
    assert sorted(back.tolist()) == sorted(set(back.tolist()))
    cells = sum(len(g.positions) ** 2 // g.documents for g in groups)
    assert cells <= 2.0 * sum(n * n for n in lengths) + 2500 * len(groups)
    assert len(groups) < 12
    assert [suits([LONGEST, 1]), suits([LONGEST + 1, 1]), suits([5])] == [True, False, False]


@pytest.mark.parametrize(("option", "bare"), [({}, True), ({"softcap": None}, True), ({"softcap": 30.0}, False)])
def test_scores_that_are_capped_are_left_to_the_models_own_function(option: dict[str, float | None], bare: bool) -> None:
    """Tables and kernels do not support a softcap: they would ignore it silently."""
    assert Call(ALL_ATTENTION_FUNCTIONS["sdpa"], nn.Identity(), dict(option)).bare is bare


@pytest.mark.parametrize("name", ENCODERS + DECODERS)
def test_packed_models_attend_in_tables_where_that_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer key heads than query heads, one call per document is used."""
    calls: list[int] = []

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return attended(*args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(short_documents, "attended", counted)
    model = classifier(name)
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(examples(), 0))
    assert not calls
    with packing(model):
        assert_equal(measured(model, adapter, pack_labelled(examples(), 0)), plain)
    config = model.config
    grouped = config.to_dict().get("num_key_value_heads", config.num_attention_heads) != config.num_attention_heads
    assert bool(calls) == (not grouped)
