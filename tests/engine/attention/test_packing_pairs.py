"""Sources and targets packed through an encoder-decoder give the loss and gradients of padded pairs, whatever their
lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway import methods
from byway.core.attention import packed
from byway.engine.attention.packing import packing
from byway.engine.attention.unpack import packed_pairs
from byway.engine.backward.checkpointing import checkpointed
from tests import tiny, zoo
from tests.engine.levers import KEYS, proved
from tests.engine.pairs import Pair, pack_pairs, pad_pairs, target_loss
from tests.tiny import randomize

RELATIVE = 1e-5
FAMILIES = ("t5", "mt5", "bart", "mbart", "marian", "pegasus", "blenderbot")
LENGTHS = [((9, 4, 12, 1, 6), (3, 7, 2, 8, 5)), ((9, 4, 12, 1, 6), (4, 9, 1, 12, 6)), ((9, 4), (9, 4))]
"""Lengths of sources and targets: different totals, the same total with different documents, the same documents."""


def pairs(lengths: tuple[tuple[int, ...], tuple[int, ...]] = LENGTHS[0], seed: int = 0) -> list[Pair]:
    g = torch.Generator().manual_seed(seed)
    drawn = [[torch.randint(3, 97, (n,), generator=g).tolist() for n in side] for side in lengths]
    found = [Pair(source, target, f"row {i}") for i, (source, target) in enumerate(zip(*drawn, strict=True))]
    found[0].labels[1] = -100
    return found


def built(name: str, implementation: str = "sdpa", method: Any = None) -> tuple[Any, byway.Adapter]:
    model = zoo.build(name)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(implementation)
    adapter = byway.attach(model, method or byway.LoRA(rank=2, targets="all-linear"))
    randomize(adapter.named_parameters())
    return model, adapter


def measured(model: nn.Module, adapter: byway.Adapter, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[float, Tensor]:
    total, count = target_loss(model, batch, labels_only=labels_only)
    assert count == int((batch["labels"] != -100).sum())
    gradients = torch.autograd.grad(total, [p for _, p in adapter.named_parameters()])
    return float(total.detach()), torch.cat([g.flatten() for g in gradients])


def assert_equal(own: tuple[float, Tensor], plain: tuple[float, Tensor]) -> None:
    assert own[0] == pytest.approx(plain[0], rel=RELATIVE)
    assert (own[1] - plain[1]).norm() <= RELATIVE * plain[1].norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_pairs_give_the_loss_and_the_gradients_of_padded_pairs(name: str, implementation: str) -> None:
    model, adapter = built(name, implementation)
    start = model.config.decoder_start_token_id
    for lengths in LENGTHS:
        rows = pairs(lengths)
        plain = measured(model, adapter, pad_pairs(rows, 0, start))
        for labels_only in (False, True):
            with packing(model):
                assert_equal(measured(model, adapter, pack_pairs(rows, 0, start), labels_only=labels_only), plain)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_padded_loss_is_transformers_own(name: str) -> None:
    model, _ = built(name)
    batch = pad_pairs(pairs(), 0, model.config.decoder_start_token_id)
    total, count = target_loss(model, batch, labels_only=False)
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert float(total.detach()) / count == pytest.approx(float(expected), rel=RELATIVE)


def test_the_first_token_of_mbart_is_the_last_of_its_target() -> None:
    from transformers.models.mbart.modeling_mbart import shift_tokens_right

    rows = [Pair([5], [4, 7, 9], "a"), Pair([5, 6], [8, 3], "b")]
    batch = pad_pairs(rows, 0, None)
    expected = shift_tokens_right(batch["labels"].clone(), 0)
    real = batch["labels"] != -100
    assert batch["decoder_input_ids"][real].tolist() == expected[real].tolist()
    assert pack_pairs(rows, 0, None)["decoder_input_ids"].tolist() == [expected[real].tolist()]


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_one_pair_leaves_the_others_bit_equal(name: str) -> None:
    model, _ = built(name)
    rows = pairs(LENGTHS[1])
    changed = [Pair([7] * 4, [11] * 9, "row 1") if i == 1 else row for i, row in enumerate(rows)]

    def answers(batch: dict[str, Any]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with packing(model), packed(), packed_pairs(inputs), torch.no_grad():
            return model(**inputs, use_cache=False).logits[0]

    before, after = (answers(pack_pairs(each, 0, 2)) for each in (rows, changed))
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[13:], before[13:])
    assert not torch.equal(after[4:13], before[4:13])


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.load(n).packable])
def test_every_packable_method_proves_itself_on_packed_pairs(name: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "adalora": {"rank": 1, "initial_rank": 3, "initial_steps": 1, "final_steps": 1},
        "bottleneck_adapter": {"reduction": 4},
        "prefix_tuning": {"hidden_size": 16},
        # T5 has no biases
        "bitfit": {},
    }
    if name == "bitfit":
        model, _ = built("bart", method=methods.load(name)())
        start = 2
    else:
        model, _ = built("t5", method=methods.load(name)(**fields.get(name, {})))
        start = 0
    rows = pairs(LENGTHS[1])
    levers = proved(model, pad_pairs(rows, 0, start), pack_pairs(rows, 0, start), {}, loss=target_loss)
    assert levers.packed, levers.line(KEYS)


def test_packed_pairs_are_recomputed_as_they_were() -> None:
    model = tiny.build("t5")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "dropout" in vars(module):  # T5's attention stores the rate as a number
            vars(module)["dropout"] = 0.0
    adapter = byway.attach(model, byway.LoRA(rank=2))
    randomize(adapter.named_parameters())
    rows = pairs(LENGTHS[1])
    plain = measured(model, adapter, pad_pairs(rows, 0, 0))
    model.train()
    with packing(model), checkpointed(model):
        assert_equal(measured(model, adapter, pack_pairs(rows, 0, 0)), plain)
