"""All packed documents in one call of a variable-length kernel; torch has one for GPUs only, so a plain double replaces
it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import byway
from byway.data.collate import pack_batch, pack_labelled, pad_labelled
from byway.engine.attention import packing as documents
from byway.engine.attention import varlen
from byway.engine.attention.packing import packing
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.shared_prefix import KEY, share
from byway.tasks.task import moved
from tests.engine import test_shared_prefix
from tests.engine.attention import test_packing_pairs
from tests.engine.attention.test_packing_rows import adapted, assert_equal, classifier, examples, measured
from tests.engine.pairs import pack_pairs, pad_pairs
from tests.tiny import build

Kernel = Callable[..., Tensor]
SUITS = varlen.suits


def one_by_one(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    """Documents by their bounds, each with a causal mask aligned with the last key, as in FlashAttention."""
    outs = []
    times = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(starts_q.unfold(0, 2, 1).tolist(), starts_k.unfold(0, 2, 1).tolist(), strict=True):
        own = [q[a:b], k[c:d].repeat_interleave(times, 1), v[c:d].repeat_interleave(times, 1)]
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a) if causal else None
        outs.append(F.scaled_dot_product_attention(*(each.transpose(0, 1) for each in own), attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outs)


class Double:
    """Replaces ``varlen_attn``: takes the same parameters and records its calls."""

    def __init__(self, wrong: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], int, int]] = []
        self.wrong = wrong

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.shape[1] == key.shape[1] or enable_gqa
        assert int(cu_seq_q[-1]) == len(query)
        assert int(cu_seq_k[-1]) == len(key) == len(value)
        self.calls.append((tuple(cu_seq_q.diff().tolist()), tuple(cu_seq_k.diff().tolist()), max_q, max_k))
        assert window_size in ((-1, 0), (-1, -1))
        return self.wrong(self.attend(query, key, value, cu_seq_q, cu_seq_k, scale=scale, causal=window_size == (-1, 0)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        return one_by_one(q, k, v, starts_q, starts_k, scale=scale, causal=causal)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernel support every device and dtype, and forget earlier verifications."""

    def suits(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> bool:
        return len(query) == 1 and not dropout

    monkeypatch.setattr(varlen, "suits", suits)
    monkeypatch.setattr(documents, "_in_tables", lambda *_: None)
    varlen._verified.cache_clear()
    yield
    varlen._verified.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> Any:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    return kernel


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_one_call_a_layer_gives_the_loss_and_the_gradients_of_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    double = put(monkeypatch, Double())
    model = classifier(name).eval()
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(examples(), 0))
    assert not double.calls
    with packing(model):
        packed = measured(model, adapter, pack_labelled(examples(), 0))
    assert_equal(packed, plain)
    proof, *calls = double.calls
    assert proof[0] == (3, 18)  # it is verified once, before it is used
    own = tuple(len(row.input_ids) for row in examples())
    assert calls == [(own, own, max(own), max(own))] * model.config.num_hidden_layers


def test_an_encoder_decoders_cross_attention_has_two_kinds_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    double = put(monkeypatch, Double())
    model, adapter = test_packing_pairs.built("bart")
    sources, targets = (9, 4, 12), (3, 7, 2)
    rows, start = test_packing_pairs.pairs((sources, targets)), model.config.decoder_start_token_id
    plain = test_packing_pairs.measured(model, adapter, pad_pairs(rows, 0, start))
    with packing(model):
        test_packing_pairs.assert_equal(test_packing_pairs.measured(model, adapter, pack_pairs(rows, 0, start)), plain)
    assert {call[:2] for call in double.calls} >= {(sources, sources), (targets, targets), (targets, sources)}


def test_segments_behind_a_common_head_are_attended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    double = put(monkeypatch, Double())
    model = build("llama").eval()
    trained = test_shared_prefix.attached(model, byway.LoRA(rank=2))
    rows = test_shared_prefix.chats(3)
    assert test_shared_prefix.assert_same(model, trained, rows) > 0
    shared = share(pack_batch(rows), least=1)
    lengths = shared["cu_seq_lens_q"].diff().tolist()
    counts = [own + sum(b - a for a, b in spans) for own, spans in zip(lengths, shared[KEY], strict=True)]
    assert counts != lengths
    assert [call[:2] for call in double.calls].count((tuple(lengths), tuple(counts))) == model.config.num_hidden_layers


def test_the_scale_of_a_model_is_given_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, Double())
    model = build("llama").eval()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.3
    trained = test_shared_prefix.attached(model, byway.LoRA(rank=2))
    test_shared_prefix.assert_same(model, trained, test_shared_prefix.chats(3))


class Slanted(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 1.1 * gradients[0]


def test_more_keys_than_queries_are_verified_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that aligns causal queries with the first keys is right if there are as many keys as queries, and used
    there."""

    class Upper(Double):
        def attend(
            self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *, scale: float | None, causal: bool
        ) -> Tensor:
            first = torch.cat([torch.arange(a, a + n) for a, n in zip(starts_k[:-1].tolist(), starts_q.diff().tolist(), strict=True)])
            return one_by_one(q, k[first], v[first], starts_q, starts_q, scale=scale, causal=causal)

    double = put(monkeypatch, Upper())
    model = build("llama").eval()
    trained = test_shared_prefix.attached(model, byway.LoRA(rank=2))
    with pytest.warns(UserWarning, match="attended one by one: its results are off"):
        test_shared_prefix.assert_same(model, trained, test_shared_prefix.chats(3))
    as_many = [queries == keys for queries, keys, *_ in double.calls]
    assert as_many.count(False) == 1  # its verification
    assert as_many.count(True) > model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"rows": 2}, False),
        ({"size": 12}, False),
        ({"size": 264}, False),
        ({"dropout": 0.1}, False),
        ({"other": torch.float32}, False),
        ({"turned": True}, False),
    ],
    ids=str,
)
def test_what_the_kernel_takes(change: dict[str, Any], fits: bool) -> None:
    given = {"dtype": torch.bfloat16, "device": "cuda", "rows": 1, "size": 64, "dropout": 0.0, "other": None, "turned": False} | change

    def states(heads: int, dtype: torch.dtype) -> Any:
        shape = (given["rows"], heads, 6, given["size"])
        tensor = (
            torch.empty(*shape[:2], shape[3], shape[2], dtype=dtype).transpose(2, 3) if given["turned"] else torch.empty(shape, dtype=dtype)
        )
        return SimpleNamespace(shape=tensor.shape, dtype=dtype, stride=tensor.stride, is_cuda=given["device"] == "cuda")

    query, key, value = states(4, given["dtype"]), *(states(2, given["other"] or given["dtype"]) for _ in range(2))
    assert SUITS(query, key, value, dropout=given["dropout"]) is fits


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(lambda out: out.roll(1, 0), "off"), (lambda out: out.detach().requires_grad_(), "differentiated"), (Slanted.apply, "off")],
    ids=["numbers", "no gradient", "wrong gradient"],
)
def test_a_kernel_that_is_wrong_is_not_used_and_that_is_said(wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    double = put(monkeypatch, Double(wrong))
    model = classifier("bert").eval()
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(examples(), 0))
    with packing(model):
        with pytest.warns(UserWarning, match=f"attended one by one: .*{said}"):
            packed = measured(model, adapter, pack_labelled(examples(), 0))
        assert_equal(packed, plain)
        measured(model, adapter, pack_labelled(examples(), 0))  # warned once
    assert len(double.calls) == 1


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int) -> Tensor:
        raise AssertionError("it is not called")

    put(monkeypatch, older)
    model = classifier("bert").eval()
    adapter = adapted(model)
    with packing(model), pytest.warns(UserWarning, match=r"in torch .* it does not take enable_gqa, scale, window_size"):
        measured(model, adapter, pack_labelled(examples(), 0))


def test_the_first_call_may_be_that_of_a_layer_that_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that the verification saves do not belong to the layer."""
    put(monkeypatch, Double())
    model = classifier("llama").eval()
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(examples(), 0))
    before = torch.get_rng_state()
    with packing(model), checkpointed(model):
        assert_equal(measured(model, adapter, pack_labelled(examples(), 0)), plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_bounds_stay_on_the_cpu_where_every_layer_reads_them() -> None:
    batch = moved(pack_labelled(examples(), 0), torch.device("meta"))
    assert {key for key, value in batch.items() if isinstance(value, Tensor) and value.device.type == "cpu"} == {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
    }
