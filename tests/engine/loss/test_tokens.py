"""The token loss and its levers, each compared with the plain computation and with transformers' own loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.data.collate import pack_batch, pad_batch
from byway.data.encode import Example
from byway.engine.attention.packing import packing
from byway.engine.backward.frontier import frontier, frontier_layers
from byway.engine.loss.tokens import token_loss
from byway.methods.lora import LoRA
from byway.train.levers import prove as probe
from tests.engine.levers import KEYS, proved
from tests.tiny import DECODERS, VOCABULARY, build, randomize

RELATIVE = 1e-5


def examples(seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for index, length in enumerate((9, 4, 12, 6)):
        ids = torch.randint(3, VOCABULARY, (length,), generator=g).tolist()
        labels = [-100] * (length // 2) + ids[length // 2 :]
        found.append(Example(ids, labels, f"row {index}"))
    return found


def padded() -> dict[str, Any]:
    return pad_batch(examples(), 0)


def gradients(model: torch.nn.Module, adapter: byway.Adapter, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for _, p in adapter.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("family", DECODERS)
def test_equals_transformers_own_loss(family: str) -> None:
    model, batch = build(family), padded()
    total, count = token_loss(model, batch, labels_only=False)
    assert count == sum(label != -100 for e in examples() for label in e.labels[1:])
    assert abs(total.detach() / count - model(**batch).loss.detach()) < RELATIVE


@pytest.mark.parametrize("labels_only", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_or_labelled_rows_only_gives_the_same_loss_and_gradients(family: str, labels_only: bool) -> None:
    model = build(family)
    adapter = byway.attach(model, LoRA(rank=3))
    randomize(adapter.named_parameters())
    plain, count = token_loss(model, padded(), labels_only=False)
    expected = gradients(model, adapter, plain)
    for batch in (padded(), pack_batch(examples())):
        with packing(model) if "cu_seq_lens_q" in batch else contextlib.nullcontext():
            total, n = token_loss(model, batch, labels_only=labels_only)
            found = gradients(model, adapter, total)
        assert n == count
        assert abs((total - plain).detach()) < RELATIVE * plain.detach()
        together, reference = torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in expected])
        assert (together - reference).norm() <= RELATIVE * reference.norm()


def test_logits_are_computed_for_labelled_tokens_only() -> None:
    model, rows = build("llama"), []
    handle = model.lm_head.register_forward_pre_hook(lambda m, args: rows.append(args[0].numel() // 32))
    _, count = token_loss(model, padded(), labels_only=True)
    token_loss(model, padded(), labels_only=False)
    handle.remove()
    assert rows == [0, count, 4 * 12], "the model's own call, the loss's, and the plain one"


def test_an_adapter_on_the_head_acts_on_the_labelled_rows() -> None:
    model = build("qwen2")
    adapter = byway.attach(model, LoRA(rank=3, targets=["lm_head"]))
    randomize(adapter.named_parameters())
    plain, _ = token_loss(model, padded(), labels_only=False)
    rows, _ = token_loss(model, padded(), labels_only=True)
    assert abs((rows - plain).detach()) < RELATIVE * plain.detach()


@pytest.mark.parametrize("labels_only", [True, False])
def test_a_batch_without_labels_gives_zero_and_no_nan(labels_only: bool) -> None:
    model = build("llama")
    adapter = byway.attach(model, LoRA(rank=2))
    batch = padded()
    batch["labels"][:] = -100
    total, count = token_loss(model, batch, labels_only=labels_only)
    assert (float(total.detach()), count) == (0.0, 0)
    total.backward()
    assert all(p.grad is None or not p.grad.any() for _, p in adapter.named_parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": ["q_proj"], "layers": "1-"}, [1]),
        ({"targets": ["q_proj"]}, [0]),
        ({"targets": ["embed_tokens", "q_proj"]}, []),
        ({"targets": ["lm_head"]}, [3]),
    ],
)
def test_the_frontier_is_the_lowest_trained_layer(options: dict[str, Any], expected: list[int]) -> None:
    model = build("llama")
    byway.attach(model, LoRA(rank=2, **options))
    assert [cut.index for cut in frontier_layers(model)] == expected


def test_the_frontier_changes_no_gradient() -> None:
    model = build("gpt2")
    adapter = byway.attach(model, LoRA(rank=2, layers="1-"))
    randomize(adapter.named_parameters())
    expected = gradients(model, adapter, token_loss(model, padded(), labels_only=False)[0])
    model.get_input_embeddings().weight.requires_grad_(True)  # gradients below must not matter
    with frontier(model) as cuts:
        assert [cut.first for cut in cuts] == ["transformer.h.1"]
        found = gradients(model, adapter, token_loss(model, padded(), labels_only=False)[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_lever_that_reproduces_the_plain_loss_is_on_and_one_that_does_not_is_off_and_says_why() -> None:
    model = build("llama")
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    levers = proved(model, padded(), pack_batch(examples()), {})
    assert (levers.packed, levers.labels_only, levers.has("frontier")) == (True, True, True)
    wrong = pack_batch(examples(seed=1))
    levers = proved(model, padded(), wrong, {"frontier": "off"})
    assert (levers.packed, levers.has("frontier")) == (False, False)
    assert "does not reproduce" in levers.reasons["pack"]
    assert "pack off (it does not reproduce" in levers.line(KEYS)
    with pytest.raises(byway.ConfigError, match=r"engine\.pack is on"):
        proved(model, padded(), wrong, {"pack": "on"})


CONTEXTS = {"pack": "packing", "frontier": "frontier", "recompute": "recomputed"}
"""Lever → the context that puts it into effect."""


@pytest.mark.parametrize("lever", ["pack", "labels_only", "frontier", "recompute"])
@pytest.mark.parametrize("times", [1 + 1e-2, 0.0], ids=["1% off", "none"])
def test_one_wrong_lever_among_all_is_named_and_the_others_stay_on(lever: str, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are tried at once. An error in one of them, here in the gradients alone, must be found and attributed to
    it."""
    model = build("llama")
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    off = {"pack": False, "frontier": False, "recompute": False}

    def wrong(name: str) -> Any:
        real = vars(import_module(f"byway.train.levers.{name}"))[CONTEXTS[name]]

        @contextmanager
        def context(*args: Any, **options: Any) -> Iterator[None]:
            off[name] = name == lever
            with real(*args, **options):
                yield
            off[name] = False

        return context

    for name, context in CONTEXTS.items():
        monkeypatch.setattr(import_module(f"byway.train.levers.{name}"), context, wrong(name))
    calls = []

    def loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
        calls.append(labels_only)
        total, count = token_loss(model, batch, labels_only=labels_only)
        if any(off.values()) or (lever == "labels_only" and labels_only):
            total = total * times + (total * (1 - times)).detach()
        return total, count

    levers = proved(model, padded(), pack_batch(examples()), {}, loss=loss)
    for name in ("pack", "labels_only", "frontier", "recompute"):
        assert levers.has(name) == (name != lever), levers.line(KEYS)
    assert "does not reproduce the plain loss here (in evaluation mode, loss off by" in levers.reasons[lever]
    assert len(calls) > 2
    with pytest.raises(byway.ConfigError, match=rf"engine\.{lever} is on, but it does not reproduce"):
        proved(model, padded(), pack_batch(examples()), {lever: "on"}, loss=loss)


def test_what_stands_is_proved_in_one_pass_of_each_mode_beside_the_plain_one() -> None:
    model = build("llama")
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    calls = []

    def loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
        calls.append(("cu_seq_lens_q" in batch, labels_only))
        return token_loss(model, batch, labels_only=labels_only)

    known = probe.plainly(model, padded(), loss=loss)
    levers = proved(model, padded(), pack_batch(examples()), {}, loss=loss, plain=known)
    assert (levers.packed, levers.labels_only, levers.has("frontier"), levers.has("recompute")) == (True, True, True, True)
    assert calls == [(False, False)] * 2 + [(True, True)] * 2, "in evaluation and in training mode"


def test_a_lever_that_is_wrong_only_in_a_factor_whose_partner_is_still_zero_is_found() -> None:
    """At the start B = 0, so A has no gradient, and an error in A's gradient would not show until B has changed."""
    model = build("llama")
    adapter = byway.attach(model, LoRA(rank=2))
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    factors = [p for name, p in adapter.named_parameters() if "lora_A" in name]

    def loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
        handles = [p.register_hook(lambda g: g * 1.5) for p in factors] if labels_only else []
        total, count = token_loss(model, batch, labels_only=labels_only)
        for p in factors if labels_only else []:
            total = total + 0 * p.sum()
        held.extend(handles)
        return total, count

    held: list[Any] = []
    levers = proved(model, padded(), None, {}, loss=loss)
    for handle in held:
        handle.remove()
    assert not levers.labels_only and "gradients by" in levers.reasons["labels_only"], levers.line(KEYS)
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())
