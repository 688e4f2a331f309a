"""A shared prefix that is run once gives the loss and gradients of whole packed documents, and of padded ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import byway
from byway.core.attention import packed
from byway.data.collate import pack_batch, pad_batch
from byway.data.encode import Example
from byway.engine.attention.packing import packing
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.shared_prefix import KEY, Sharing, layout, segments, share
from tests import zoo
from tests.tiny import DECODERS, VOCABULARY, bert_mlm, build, randomize

RELATIVE = 1e-5


def example(ids: Sequence[int], first: int, where: str = "row") -> Example:
    """A document whose tokens from `first` on are in the loss."""
    return Example(list(ids), [-100] * first + list(ids[first:]), where)


def chats(seed: int, rows: int = 6, heads: int = 2) -> list[Example]:
    """Documents that start with one of a few prefixes or a part of it; labels start anywhere, also within the
    prefix."""
    draw = random.Random(seed)
    known = [[draw.randint(3, VOCABULARY - 1) for _ in range(draw.randint(1, 14))] for _ in range(heads)]
    found = []
    for _ in range(rows):
        head = draw.choice(known)
        head = head[: draw.randint(1, len(head))] if draw.random() < 0.5 else head
        ids = head + [draw.randint(3, VOCABULARY - 1) for _ in range(draw.randint(1, 12))]
        found.append(example(ids, draw.randint(0, len(ids))))
    return found


def measured(model: nn.Module, batch: dict[str, Any], trained: Sequence[Tensor]) -> tuple[float, int, Tensor]:
    """(summed loss, number of labels, gradients), in the model's own dtype."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    together = "cu_seq_lens_q" in batch
    with packing(model) if together else nullcontext(), packed() if together else nullcontext():
        logits = model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        grads = torch.autograd.grad(loss, list(trained), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)]
    return float(loss.detach()), int((targets != -100).sum()), torch.cat([g.flatten() for g in flat])


def assert_same(model: nn.Module, trained: Sequence[Tensor], rows: Sequence[Example], tolerance: float = RELATIVE) -> float:
    """Check that shared, packed and padded batches agree; return the share of tokens saved."""
    whole = pack_batch(rows)
    fewer = share(pack_batch(rows), least=1)
    loss, count, gradient = measured(model, fewer, trained)
    for plain in (whole, pad_batch(rows, 0)):
        expected, labels, reference = measured(model, plain, trained)
        assert count == labels
        assert abs(loss - expected) <= tolerance * max(abs(expected), 1)
        assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-30
    return 1 - fewer["input_ids"].shape[1] / whole["input_ids"].shape[1]


def attached(model: Any, method: Any) -> list[nn.Parameter]:
    adapter = byway.attach(model, method)
    randomize(adapter.named_parameters())
    return [p for _, p in adapter.named_parameters()]


def lora() -> Any:
    return byway.LoRA(rank=2, targets="all-linear")


# -------------------------------------------------------------------- exactness


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradients_are_those_of_whole_documents(family: str, implementation: str, seed: int) -> None:
    model = build(family)
    model.set_attn_implementation(implementation)
    trained = attached(model, lora())
    assert sum(assert_same(model, trained, chats(seed + n)) for n in range(3)) > 0.2


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_in_float64_the_difference_is_that_of_float64(family: str, seed: int) -> None:
    """Families whose norms compute in the model's own dtype."""
    model = (zoo.build(family) if family == "gpt_neox" else build(family)).double()
    assert_same(model, attached(model, lora()), chats(seed), tolerance=1e-12)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "phi3", "olmo2", "mixtral", "deepseek_v3", "cohere", "gpt_oss"])
def test_other_shapes_of_decoders(family: str, seed: int) -> None:
    """Soft caps and sinks (eager attention), fused projections, experts, latent attention, parallel blocks."""
    model = zoo.build(family)
    assert assert_same(model, attached(model, lora()), chats(seed)) > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [3, 8])
def test_a_sliding_window_counts_the_documents_own_distances(window: int, implementation: str, seed: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=window, **sizes)).eval()
    model.set_attn_implementation(implementation)
    trained = attached(model, lora())
    for number in range(3):
        rows = chats(seed + number)
        loss, count, gradient = measured(model, share(pack_batch(rows), least=1), trained)
        expected, labels, reference = measured(model, pack_batch(rows), trained)
        alone = sum(measured(model, pack_batch([row]), trained)[0] for row in rows)
        assert count == labels
        assert abs(loss - expected) <= RELATIVE * expected
        assert abs(loss - alone) <= RELATIVE * alone
        assert (gradient - reference).norm() <= RELATIVE * reference.norm()


METHODS = {
    "prefix_tuning": lambda: byway.PrefixTuning(num_virtual_tokens=3),
    "p_tuning_v2": lambda: byway.PTuningV2(num_virtual_tokens=3),
    "bottleneck": lambda: byway.BottleneckAdapter(reduction=4),
    "ladder": lambda: byway.LadderSideTuning(reduction=2),
    "ia3": lambda: byway.IA3(),
    "dora": lambda: byway.DoRA(rank=2),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_of_side_path(family: str, method: str, implementation: str, seed: int) -> None:
    model = build(family)
    model.set_attn_implementation(implementation)
    trained = attached(model, METHODS[method]())
    assert assert_same(model, trained, chats(seed)) > 0


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "bottleneck"])
def test_under_checkpointing(method: str, seed: int) -> None:
    model = build("llama")
    trained = attached(model, lora() if method == "lora" else METHODS[method]())
    rows = chats(seed)
    plain = measured(model, pack_batch(rows), trained)
    model.train()
    with checkpointed(model):
        found = measured(model, share(pack_batch(rows), least=1), trained)
    assert abs(found[0] - plain[0]) <= RELATIVE * plain[0]
    assert (found[2] - plain[2]).norm() <= RELATIVE * plain[2].norm()


HEAD = [5, 6, 7, 8, 9, 10]
SPECIAL: dict[str, tuple[list[Example], int]] = {
    "two groups": (
        [example([*HEAD, 20], 6), example([31, 32, 33, 34], 2), example([*HEAD, 21, 22], 7), example([31, 32, 33, 35], 3)],
        6 + 2,
    ),
    "heads within heads": (
        [example([*HEAD, 20], 6), example([*HEAD, 11, 12, 21], 8), example([*HEAD, 11, 12, 22], 8), example([*HEAD[:3], 40, 41], 4)],
        7 + 5 + 3,
    ),
    "a document that is a head of another": ([example([*HEAD, 20, 21], 7), example(HEAD, 5)], 6),
    "a document that is a head and predicts nothing": ([example([*HEAD, 20, 21], 7), example(HEAD, 6)], 6),
    "equal documents": ([example([*HEAD, 20, 21], 6)] * 3, 5 * 2),
    "equal documents that predict nothing": ([example(HEAD, 6), example(HEAD, 6), example([*HEAD, 3], 6)], 6 + 5),
    "labels from the second token on": ([example([*HEAD, 20], 0), example([*HEAD, 21], 0)], 0),
    "labels in the head of one": ([example([*HEAD, 20], 2), example([*HEAD, 21], 6)], 5),
    "one token rests": ([example([*HEAD, 20], 7), example([*HEAD, 21], 7), example([*HEAD, 22, 23], 7)], 6 + 6),
    "nothing in common": ([example([9, *HEAD], 3), example([8, *HEAD], 3)], 0),
    "one document": ([example(HEAD, 3)], 0),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_layouts(case: str) -> None:
    rows, saved = SPECIAL[case]
    model = build("gpt2").double()
    trained = attached(model, lora())
    assert_same(model, trained, rows, tolerance=1e-12)
    fewer = share(pack_batch(rows), least=1)
    assert pack_batch(rows)["input_ids"].shape[1] - fewer["input_ids"].shape[1] == saved
    assert (KEY in fewer) == (saved > 0)


def test_a_change_in_one_document_leaves_the_others_bit_equal() -> None:
    model = build("llama")
    rows = [example([*HEAD, 20, 21], 7), example([*HEAD, 22, 23, 24], 7)]
    other = [rows[0], example([*HEAD, 22, 23, 25], 7)]
    outs = []
    for documents in (rows, other):
        batch = share(pack_batch(documents), least=1)
        batch.pop("labels")
        with packing(model), packed():
            outs.append(model(**batch, use_cache=False).logits)
    assert torch.equal(outs[0][:, :8], outs[1][:, :8])
    assert not torch.equal(outs[0][:, 8:], outs[1][:, 8:])


# -------------------------------------------------------------------- what is refused


def test_an_encoder_is_refused() -> None:
    model = bert_mlm().eval()
    batch = share(pack_batch([example([*HEAD, 20], 6), example([*HEAD, 21], 6)]), least=1)
    with packing(model), packed(), pytest.raises(byway.AdapterError, match="causal attention"):
        model(**{key: value for key, value in batch.items() if key != "labels"})


def test_a_window_of_unknown_width_is_refused() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**zoo.MODELS["qwen2_moe"][2], **options})).eval()
    batch = share(pack_batch([example([*HEAD, 20], 6), example([*HEAD, 21], 6)]), least=1)
    batch.pop("labels")
    with packing(model), pytest.raises(byway.AdapterError, match="how far it sees"):
        model(**batch, use_cache=False)


# -------------------------------------------------------------------- layouts

documents = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(documents, st.randoms(use_true_random=False), st.integers(1, 3))
def test_every_layout_holds_every_document_and_no_label_is_shared(tokens: list[list[int]], draw: random.Random, least: int) -> None:
    rows = [Example(ids, [i if draw.random() < 0.4 else -100 for i in ids], "row") for ids in tokens]
    batch = pack_batch(rows)
    found = segments(batch, least)
    fewer = share(batch, least)
    row, labels = fewer["input_ids"][0].tolist(), fewer["labels"][0].tolist()
    starts = fewer["cu_seq_lens_q"].tolist()
    assert starts[-1] == len(row) == sum(s.end - s.begin for s in found)
    if KEY not in fewer:
        assert torch.equal(fewer["input_ids"], batch["input_ids"])
        return
    assert fewer[KEY] == tuple(s.prefix for s in found)
    for number, segment in enumerate(found):
        whole = [token for a, b in (*segment.prefix, (starts[number], starts[number + 1])) for token in row[a:b]]
        assert whole == tokens[segment.document]
        assert not segment.begin or segment.begin >= least
        # the labels of each document, and the positions that predict them, are unchanged
        expected = [-100, *rows[segment.document].labels[1:]]
        assert labels[starts[number] : starts[number + 1]] == expected[segment.begin :]
        assert all(label == -100 for label in expected[: segment.begin + 1])
    places = [(s.document, position) for s in found for position in range(s.begin, s.end)]
    assert [tokens[document][position] for document, position in places] == row
    assert [position for _, position in places] == fewer["position_ids"][0].tolist()
    missing = set(range(len(rows))) - {s.document for s in found}
    assert all(label == -100 for d in missing for label in rows[d].labels[1:])


def test_a_short_head_is_left_as_it_is() -> None:
    rows = [example([*HEAD, 20], 6), example([*HEAD, 21], 6)]
    assert KEY not in share(pack_batch(rows), least=7)
    assert [s.begin for s in layout([[1, 2, 3], [1, 2, 4]], [3, 3], least=3)] == [0, 0]


# -------------------------------------------------------------------- the plan


def test_a_step_keeps_its_rows_and_alike_rows_come_together() -> None:
    one, other = [[10 * g + n % 10 for n in range(20)] for g in (1, 2)]
    rows = [example([*(one, other)[n % 2], 90 + n % 7, 80 + n], 21) for n in range(8)]
    sharing = Sharing(rows, least=4)
    step = ((0, 1), (2, 3), (4, 5), (6, 7))
    found = sharing.rearranged(step, limit=50)
    assert sorted(i for micro in found for i in micro) == list(range(8))
    assert all(sharing.tokens(micro) <= 50 for micro in found)
    assert [{i % 2 for i in micro} for micro in found] == [{0}, {1}]
    assert sum(map(sharing.tokens, found)) == 8 * 22 - 6 * 20
    assert sharing.saved([found]) == pytest.approx(6 * 20 / (8 * 22))
    assert sharing.saved([step]) == 0


def test_a_step_with_nothing_in_common_stays_as_it_was() -> None:
    rows = [example([n, n + 1, n + 2], 1) for n in range(3, 9)]
    step = ((0, 5), (1, 2), (4, 3))
    assert Sharing(rows).rearranged(step, limit=6) is step


def test_a_row_that_is_longer_than_a_micro_batch_stands_alone() -> None:
    rows = [example([*HEAD, *range(20, 40)], 20), example([*HEAD, 50, 51], 7), example([*HEAD, 52, 53], 7)]
    found = Sharing(rows, least=4).rearranged(((0,), (1,), (2,)), limit=10)
    assert sorted(map(len, found)) == [1, 2]
    assert (0,) in found
