"""A real model, really trained: what byway trains HF peft runs, and what peft trains byway runs and trains on, with the same logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import byway
from byway.engine.loss.tokens import token_loss
from tests import tiny

STORY = (
    "Once upon a time, there was a little girl named Lily. She liked to walk in the park with her dog.",
    "One day, Tom found a big red ball. He wanted to play, but his mom said it was time to eat.",
    "The cat was sad. It could not find its toy. Then a kind bird came and helped the cat look for it.",
)
STEPS, RATE = 3, 2e-2
LEARNED = 0.02
"""So much lower must the loss be after training, in nats, or too little is compared."""


@dataclass(frozen=True)
class Case:
    theirs: dict[str, Any]
    """Arguments of peft.LoraConfig."""
    ours: dict[str, Any]
    """The same as arguments of byway.LoRA."""
    base: str = "stories"


REGEX = r"model\.layers\.[1-3]\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {"up_proj": 5}}
CASES = {
    "a list": Case({"target_modules": ["q_proj", "v_proj"]}, {"targets": ["q_proj", "v_proj"]}),
    "a regular expression": Case({"target_modules": REGEX}, {"targets": REGEX}),
    "rank patterns": Case({"target_modules": ["q_proj", "up_proj"], **PATTERNS}, {"targets": ["q_proj", "up_proj"], **PATTERNS}),
    "rank-stabilized": Case(
        {"target_modules": "all-linear", "use_rslora": True},
        {"targets": "all-linear", "rank_stabilized": True},
    ),
    "embeddings": Case({"target_modules": ["embed_tokens", "q_proj"]}, {"targets": ["embed_tokens", "q_proj"]}),
    "modules to save": Case(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "GPT-2": Case({"target_modules": ["c_attn", "c_proj"]}, {"targets": ["c_attn", "c_proj"]}, "gpt2"),
}


@pytest.fixture(autouse=True)
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, Conv1D and saved embeddings; tests/formats looks at that
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Bench:
    """A base, made anew at each call, and a batch for it."""

    make: Callable[[], Any]
    batch: dict[str, Tensor]


@pytest.fixture(scope="module")
def benches(data_dir: Path) -> dict[str, Bench]:
    """The 260K-parameter stories model with real text, and a GPT-2 with random weights (none that is small is at hand)."""
    path = data_dir / "stories260k" / "hf"
    stories, tokenizer = byway.load_base(path, dtype="fp32")
    gpt2 = tiny.build("gpt2")
    assert tokenizer is not None
    batch = dict(tokenizer(list(STORY), return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    real = {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), **batch}
    ids = torch.randint(3, tiny.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))
    return {
        "stories": Bench(lambda: copy.deepcopy(stories), real),
        "gpt2": Bench(lambda: copy.deepcopy(gpt2), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}),
    }


def train(model: Any, parameters: list[Tensor], batch: dict[str, Tensor], steps: int = STEPS) -> list[float]:
    """A plain loop over the model's own loss, without GPT-2's dropout; the mean loss of each step."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    losses = []
    for _ in range(steps):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def difference(got: Tensor, expected: Tensor) -> float:
    """max |a − b| / max |b|; the stories model's logits go up to 20, where float32 itself is 2e-6 wide."""
    return float((got - expected).abs().max() / expected.abs().max())


def continued(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval().generate(input_ids=batch["input_ids"][:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=0)


def trained_by_peft(bench: Bench, case: Case) -> Any:
    torch.manual_seed(4)
    model = peft.get_peft_model(bench.make(), peft.LoraConfig(r=4, lora_alpha=8, **case.theirs))
    losses = train(model, [p for p in model.parameters() if p.requires_grad], bench.batch)
    assert losses[-1] < losses[0] - LEARNED
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_byway_trains_gives_the_same_logits_in_peft(case: Case, benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches[case.base]
    torch.manual_seed(4)
    model = bench.make()
    bare = logits(model, bench.batch)
    adapter = byway.attach(model, byway.LoRA(rank=4, alpha=8, **case.ours))
    losses = train(model, [p for _, p in adapter.named_parameters()], bench.batch)
    assert losses[-1] < losses[0] - LEARNED
    adapter.save(tmp_path / "adapter")
    expected = logits(model, bench.batch)
    assert (expected - bare).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(bench.make(), str(tmp_path / "adapter"))
    assert difference(logits(theirs, bench.batch), expected) <= 1e-5
    assert torch.equal(continued(theirs, bench.batch), continued(model, bench.batch))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_peft_trains_gives_the_same_logits_in_byway(case: Case, benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches[case.base]
    theirs = trained_by_peft(bench, case)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = logits(theirs, bench.batch)
    model = bench.make()
    bare = logits(model, bench.batch)
    byway.load(model, tmp_path / "adapter")
    assert (expected - bare).abs().max() > 0.1
    assert difference(logits(model, bench.batch), expected) <= 1e-5
    assert torch.equal(continued(model, bench.batch), continued(theirs, bench.batch))
    byway.merge(model)
    assert difference(logits(model, bench.batch), expected) <= 1e-5


@pytest.mark.parametrize("name", ["rank patterns", "embeddings", "modules to save", "GPT-2"])
def test_training_goes_on_in_byway_as_it_does_in_peft(name: str, benches: dict[str, Bench], tmp_path: Path) -> None:
    case = CASES[name]
    bench = benches[case.base]
    theirs = trained_by_peft(bench, case)
    theirs.save_pretrained(tmp_path / "adapter")
    model = bench.make()
    adapter = byway.load(model, tmp_path / "adapter", trainable=True)
    theirs(**bench.batch, use_cache=False).loss.backward()
    loss, count = token_loss(model, bench.batch, labels_only=True)
    (loss / count).backward()
    of_peft = {id(p): p for p in theirs.parameters() if p.requires_grad and p.grad is not None}
    own = [p.grad for _, p in adapter.named_parameters()]
    assert len(own) == len(of_peft) and all(g is not None for g in own)
    norms = sorted(float(p.grad.double().norm()) for p in of_peft.values() if p.grad is not None)
    assert sorted(float(g.double().norm()) for g in own if g is not None) == pytest.approx(norms, rel=1e-4, abs=1e-8)
