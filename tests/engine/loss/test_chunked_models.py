"""The chunked loss on whole models: every family, adapters and hooks on the head, masked and encoder-decoder labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import byway
from byway.core.families import facts
from byway.core.slots import SidePath
from byway.engine.loss import cross_entropy
from byway.engine.loss.cross_entropy import LossTerms
from byway.engine.loss.tokens import token_loss, unchunked
from byway.errors import ConfigError, TargetError
from byway.methods.dora import DoRA
from byway.methods.ia3 import IA3
from byway.methods.lora import LoRA
from tests import zoo
from tests.engine.levers import KEYS, proved
from tests.engine.losses import CAUSAL, TERMS, assert_equal_to_plain, batch, by_hand, measured
from tests.tiny import build, llama, randomize

# ---------------------------------------------------------------- models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_family_gives_the_plain_loss_and_gradients(name: str, dtype: torch.dtype, small_chunks: None) -> None:
    model = zoo.build(name).to(dtype)
    model.set_experts_implementation("eager")  # torch's grouped product does not support float64
    adapter = byway.attach(model, LoRA(rank=2, targets="all-linear"))
    randomize(adapter.named_parameters())
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: calls.append(args[0].numel() // args[0].shape[-1]))
    given = batch()
    assert_equal_to_plain(model, given, 1e-5 if dtype == torch.float32 else 1e-12)
    count = int((given["labels"][:, 1:] != -100).sum())
    whole = [given["labels"].numel()]
    assert calls == whole + ([count] if facts(model).after_head else [0, 4, 4, 4, 4]) and count == 16
    assert bool(unchunked(model)) is facts(model).after_head


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_smoothing_and_z_loss_equal_the_formula_on_all_logits(name: str, terms: LossTerms, small_chunks: None) -> None:
    model, given = zoo.build(name).double(), batch()
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    wanted = given["labels"][:, 1:]
    expected = by_hand(logits[wanted != -100], wanted[wanted != -100], terms)
    for labels_only in (True, False):
        total, _ = token_loss(model, given, labels_only=labels_only, terms=terms)
        assert abs(total - expected) <= 1e-12 * expected
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    assert_equal_to_plain(model, given, 1e-12, terms=terms)


@pytest.mark.parametrize("labels_only", [True, False])
def test_an_evaluation_forms_no_slope(labels_only: bool, small_chunks: None) -> None:
    model = build("llama")
    randomize(byway.attach(model, LoRA(rank=2, targets=["q_proj", "lm_head"])).named_parameters())
    expected, _ = token_loss(model, batch(), labels_only=False)
    shapes: list[bool] = []
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.requires_grad))
    with torch.no_grad():
        total, _ = token_loss(model, batch(), labels_only=labels_only)
    assert abs(total - expected) <= 1e-6 * expected and not total.requires_grad and not any(shapes)


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_more_than_a_chunk_of_logits_ever_exists(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    v, rows = 6000, 16
    monkeypatch.setattr(cross_entropy, "_BUDGET", {"cpu": 4 * v * rows, "cuda": 1})
    monkeypatch.setattr(cross_entropy, "_FEWEST", {"cpu": 1, "cuda": 1})
    model: Any = llama(vocab_size=v, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = model.to(dtype)
    byway.attach(model, LoRA(rank=2, targets=["q_proj", "lm_head"]))
    given = batch(lengths=(60, 40), vocabulary=v)
    largest = {}
    for labels_only in (True, False):
        with _Largest() as seen:
            total, count = token_loss(model, given, labels_only=labels_only)
            total.backward()
        largest[labels_only] = seen.size
    assert count == 50 and largest[False] >= 4 * v * count
    assert largest[True] <= 4 * v * rows
    with _Largest() as seen, torch.no_grad():
        token_loss(model, given, labels_only=True)
    assert seen.size <= 4 * v * rows


def test_the_same_batch_gives_the_same_bits(small_chunks: None) -> None:
    model = build("llama").train()
    byway.attach(model, LoRA(rank=3, dropout=0.3, targets=["q_proj", "lm_head"]))
    model.train()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(measured(model, batch(), labels_only=True))
    assert torch.equal(found[0][0], found[1][0]) and all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# ---------------------------------------------------------------- what may be attached to a head


class Bent(SidePath):
    """Changes input and output of a head, and saves its own output for the backward pass (tanh)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.sharp = nn.Parameter(torch.tensor(0.7))

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value * self.tilt.to(value.dtype) for name, value in inputs.items()}

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return torch.tanh(out * self.sharp.to(out.dtype))


def bend(model: Any) -> None:
    from byway.core.attach import install
    from byway.core.slots import Site

    site = Site("lm_head", model.lm_head)
    install(model, LoRA(rank=1, targets=["lm_head"]), "bent", [(site, Bent(32).double())])


def scaled_at_both_ends(model: Any) -> None:
    byway.attach(model, IA3(targets=["k_proj", "lm_head"], feed_forward=["lm_head"]))


def unfrozen(model: Any) -> None:
    byway.attach(model, LoRA(rank=2))
    model.lm_head.weight.requires_grad_(True)


def hooked(model: Any) -> None:
    byway.attach(model, LoRA(rank=2))
    model.lm_head.register_forward_hook(lambda m, args, out: 0.5 * out)
    model.lm_head.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))


def two_adapters(model: Any) -> None:
    byway.attach(model, LoRA(rank=2, targets=["lm_head"]), "one")
    byway.attach(model, LoRA(rank=2, targets=["lm_head"]), "two")
    byway.attach(model, LoRA(rank=2, targets=["lm_head"]), "idle")
    byway.activate(model, ["one", "two"])


def attached(**options: Any) -> Callable[[Any], None]:
    def attach(model: Any) -> None:
        byway.attach(model, LoRA(rank=3, **options))

    return attach


HEADS: dict[str, Callable[[Any], None]] = {
    "LoRA on the head": attached(targets=["q_proj", "lm_head"]),
    "LoRA on the head alone": attached(targets=["lm_head"]),
    "DoRA on the head": lambda model: byway.attach(model, DoRA(rank=3, targets=["q_proj", "lm_head"])) and None,
    "a copy of the head": attached(modules_to_save=["lm_head"]),
    "trained tokens": attached(trained_tokens=[5, 60]),
    "scales": scaled_at_both_ends,
    "before and after": bend,
    "the base's own head": unfrozen,
    "a user's hooks": hooked,
    "two adapters and one that sleeps": two_adapters,
}


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3]], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("attached", HEADS)
def test_whatever_is_attached_to_the_head_gets_the_plain_gradients(attached: str, tied: bool, terms: LossTerms, small_chunks: None) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=tied).double()
    HEADS[attached](model)
    for adapter in byway.adapters(model).values():
        moved = [(name, p) for name, p in adapter.named_parameters() if "copy" not in name and "rows" not in name]
        randomize(moved, scale=0.3)
    assert_equal_to_plain(model, batch(), 1e-12, terms=terms)


def test_disabled_adapters_act_neither_in_the_trunk_nor_on_the_head(small_chunks: None) -> None:
    model = build("llama")
    base, _ = token_loss(model, batch(), labels_only=True)
    randomize(byway.attach(model, LoRA(rank=3, targets=["q_proj", "lm_head"])).named_parameters())
    with byway.disabled(model):
        muted, _ = token_loss(model, batch(), labels_only=True)
    adapted, _ = token_loss(model, batch(), labels_only=True)
    assert torch.equal(muted, base) and not muted.requires_grad
    assert adapted != base and adapted.requires_grad


@contextmanager
def quantized(model: Any, kind: str) -> Iterator[None]:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized head to try")
    weight = model.lm_head.weight.detach().clone()
    if kind == "nf4":
        model.lm_head = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32)
        model.lm_head.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        model.lm_head = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
        model.lm_head.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model.lm_head.to("cpu")
    yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_head_with_an_adapter(kind: str, small_chunks: None) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False, hidden_size=64, vocab_size=128)
    with quantized(model, kind):
        randomize(byway.attach(model, LoRA(rank=3, targets=["q_proj", "lm_head"])).named_parameters())
        assert_equal_to_plain(model, batch())


# ---------------------------------------------------------------- other models' labels


@pytest.mark.parametrize("name", ["t5", "mt5", "bart", "mbart", "marian", "pegasus", "bert", "roberta", "albert", "modernbert", "mpnet"])
def test_masked_and_encoder_decoder_losses_equal_transformers_own(name: str, small_chunks: None) -> None:
    model = zoo.build(name)
    for key, buffer in model.named_buffers():
        if key == "final_logits_bias":  # zero in a new model
            buffer.normal_()
    randomize(byway.attach(model, LoRA(rank=2, targets="all-linear")).named_parameters())
    given = batch(seed=3)
    expected = model(**given).loss
    for labels_only in (True, False):
        total, count = token_loss(model, given, labels_only=labels_only, next_token=False)
        assert count == int((given["labels"] != -100).sum())
        assert abs(total / count - expected) <= 1e-5 * expected
    assert_equal_to_plain(model, given, next_token=False)
    assert bool(unchunked(model)) is (name in ("bart", "mbart", "marian", "pegasus"))


def test_a_decoder_that_does_not_shift_labels_asks_for_its_inputs() -> None:
    model, given = zoo.build("blenderbot"), batch(seed=3)
    with pytest.raises(ConfigError, match=r"Blenderbot.*does not shift labels itself"):
        token_loss(model, given, labels_only=True, next_token=False)
    total, count = token_loss(model, given | {"decoder_input_ids": given["input_ids"]}, labels_only=True, next_token=False)
    expected = model(**given, decoder_input_ids=given["input_ids"]).loss
    assert abs(total / count - expected) <= 1e-5 * expected


class Twice(nn.Module):
    """A model whose head runs twice, or never, in one forward pass."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner, self.times = build("llama"), times

    def forward(self, **inputs: Any) -> Any:
        hidden = self.inner.model(**inputs).last_hidden_state
        out = [self.inner.lm_head(hidden) for _ in range(self.times)] or [hidden @ self.inner.lm_head.weight.T]
        return type("Out", (), {"logits": out[0]})()


@pytest.mark.parametrize("times", [0, 2])
def test_a_head_that_is_not_called_once_is_refused(times: int) -> None:
    with pytest.raises(TargetError, match=f"called {times} times"):
        token_loss(Twice(times), batch(), labels_only=True)
    with nullcontext():
        total, count = token_loss(Twice(times), batch(), labels_only=False)
    assert total.isfinite() and count == 16


@pytest.mark.parametrize(("name", "shown"), [("llama", "labels_only on, "), ("granite", "labels_only on (unchunked: the model changes")])
def test_the_plan_line_says_what_is_held_at_once(name: str, shown: str) -> None:
    model = zoo.build(name)
    randomize(byway.attach(model, LoRA(rank=2)).named_parameters())
    assert shown in proved(model, batch(), None, {}).line(KEYS)
