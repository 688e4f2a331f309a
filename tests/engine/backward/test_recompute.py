"""Recomputing cheap activations gives the plain loss and gradients, keeps less, and leaves the model unchanged."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.slots import base_modules
from byway.data.collate import pack_batch
from byway.data.encode import Example
from byway.engine.attention.packing import packing
from byway.engine.backward import recompute
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.recompute import again, recomputed
from byway.engine.loss.tokens import token_loss
from tests.tiny import DECODERS, FAMILIES, LAYERS, build, inputs, randomize

METHODS = {
    "lora": lambda: byway.LoRA(rank=4, targets="all-linear"),
    "bottleneck": lambda: byway.BottleneckAdapter(reduction=4),
    "norms": lambda: byway.LayerNormTuning(),
    "ladder": lambda: byway.LadderSideTuning(reduction=4),
}


def attached(family: str, method: str = "lora", seed: int = 0) -> tuple[Any, list[nn.Parameter]]:
    model = build(family, seed)
    adapter = byway.attach(model, METHODS[method]())
    randomize(adapter.named_parameters())
    return model, [p for _, p in adapter.named_parameters()]


def step(model: Any, family: str, trained: list[nn.Parameter], seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    logits = model(**inputs(family, seed)).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def assert_same(own: list[Tensor], plain: list[Tensor], tolerance: float = 1e-5) -> None:
    whole = torch.stack([g.double().norm() for g in plain]).norm()
    apart = torch.stack([(a.double() - b.double()).norm() for a, b in zip(own, plain, strict=True)]).norm()
    assert whole > 0
    assert apart <= tolerance * whole


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_same_to_the_bit_and_gradients_but_for_the_order_of_summation(family: str, method: str, seed: int) -> None:
    model, trained = attached(family, method, seed)
    plain_loss, plain = step(model, family, trained, seed)
    with recomputed(model, smallest=1) as count:
        loss, own = step(model, family, trained, seed)
    # nothing to recompute: the norms are trained, and ReLU keeps its output
    assert count > 0 or (method in ("bottleneck", "norms") and family in ("opt", "t5"))
    assert torch.equal(loss, plain_loss)
    assert_same(own, plain)


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_in_float64(family: str, seed: int) -> None:
    model, trained = attached(family, seed=seed)
    model.double()
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (5, 9, 2)]
    batch = pack_batch([Example(input_ids=tuple(ids), labels=tuple(ids), where="") for ids in rows])
    found = []
    for context in (nullcontext(), recomputed(model, smallest=1)):
        with packing(model), context:
            total, _ = token_loss(model, batch, labels_only=True)
            found.append(torch.autograd.grad(total, trained, allow_unused=True))
    plain, own = ([g for g in grads if g is not None] for grads in found)
    assert_same(own, plain, 1e-13)


def test_dropped_inputs_are_had_again_with_the_same_mask(seed: int) -> None:
    model = build("llama", seed)
    adapter = byway.attach(model, byway.LoRA(rank=4, targets="all-linear", dropout=0.3))
    randomize(adapter.named_parameters())
    trained = [p for _, p in adapter.named_parameters()]
    model.train()
    found = []
    for context in (nullcontext(), recomputed(model, smallest=1)):
        torch.manual_seed(seed)
        with context:
            found.append(step(model, "llama", trained))
    (plain_loss, plain), (loss, own) = found
    assert torch.equal(loss, plain_loss)
    assert_same(own, plain)


def kept_bytes(model: Any, family: str) -> int:
    """Bytes that autograd keeps, without the model's own tensors; inputs of a recipe are counted where they are
    kept."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    plain_pack = recompute._pack

    def pack(tensor: Tensor, smallest: int) -> Any:
        done = plain_pack(tensor, smallest)
        if isinstance(done, recompute._Kept) and done.tensor.untyped_storage().data_ptr() not in own:
            kept[done.tensor.untyped_storage().data_ptr()] = done.tensor
        return done

    recompute._pack = pack
    try:
        with recomputed(model, smallest=1 if family.endswith("lean") else 1 << 60):
            loss = model(**inputs(family.removesuffix("-lean"), rows=4, length=24)).logits.sum()
        return sum(t.untyped_storage().nbytes() for t in kept.values()) + 0 * int(loss.numel())
    finally:
        recompute._pack = plain_pack


@pytest.mark.parametrize(("family", "share"), [("llama", 0.75), ("gpt2", 0.6), ("t5", 0.85), ("bert", 0.85)])
def test_less_is_kept(family: str, share: float, seed: int) -> None:
    model, _ = attached(family, seed=seed)
    assert kept_bytes(model, f"{family}-lean") < share * kept_bytes(model, family)


def test_no_matrix_product_is_repeated(seed: int) -> None:
    model, trained = attached("llama", seed=seed)
    calls: list[str] = []
    for path, module in base_modules(model):
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, o, path=path: calls.append(path))
    with recomputed(model, smallest=1):
        step(model, "llama", trained)
    assert len(calls) == len(set(calls)) == 7 * LAYERS + 1


def test_a_second_backward_pass_over_the_same_graph_gives_the_same(seed: int) -> None:
    model, trained = attached("llama", seed=seed)
    with recomputed(model, smallest=1):
        loss = model(**inputs("llama")).logits.pow(2).sum()
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_goes_together_with_checkpointing(seed: int) -> None:
    model, trained = attached("llama", seed=seed)
    _, plain = step(model, "llama", trained)
    model.train()
    with checkpointed(model), recomputed(model, smallest=1):
        _, own = step(model, "llama", trained)
    assert_same(own, plain)


def test_afterwards_the_model_is_as_it_was_also_after_an_error(seed: int) -> None:
    model, _ = attached("gpt2", seed=seed)
    before = {path: dict(vars(module)) for path, module in base_modules(model)}
    with pytest.raises(RuntimeError, match="on purpose"), recomputed(model):
        raise RuntimeError("on purpose")
    assert {path: dict(vars(module)) for path, module in base_modules(model)} == before


def test_norms_that_are_trained_or_adapted_are_left_alone(seed: int) -> None:
    counts = []
    for method in ("lora", "norms"):
        model, _ = attached("llama", method, seed)
        with recomputed(model) as count:
            counts.append(count)
    assert counts == [2 * LAYERS + 1 + LAYERS, LAYERS]


def test_a_wrong_recipe_would_be_seen(seed: int) -> None:
    """The comparison above would notice a wrong recipe: it changes gradients."""
    model, trained = attached("llama", seed=seed)
    _, plain = step(model, "llama", trained)

    class Doubled(recompute._Lean):
        def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Any:
            out = super().__call__(x, *rest, **options)
            if recompute._TAG in out.__dict__:
                again(out, lambda: 2 * self.plain(self.module, x.detach()))
            return out

    original, recompute._Lean = recompute._Lean, Doubled
    try:
        with recomputed(model, smallest=1):
            _, own = step(model, "llama", trained)
    finally:
        recompute._Lean = original
    with pytest.raises(AssertionError):
        assert_same(own, plain)


def test_a_graph_that_is_dropped_without_a_backward_pass_is_freed(seed: int) -> None:
    model, _ = attached("llama", seed=seed)
    gc.collect()
    gc.disable()
    try:
        with recomputed(model, smallest=1):
            logits = model(**inputs("llama")).logits
            nodes = [weakref.ref(t) for t in gc.get_objects() if type(t) is recompute._Again]
            assert nodes
            del logits
        assert not [node for node in nodes if node() is not None]
    finally:
        gc.enable()
