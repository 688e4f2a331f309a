"""What only a GPU can show: its kernels give what the plain computation gives, and a run there is the run of a CPU.

python -m pytest tests/gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import byway
from byway.base.arithmetic import integers
from byway.data.collate import pack_labelled, pad_labelled
from byway.engine.attention import varlen
from byway.engine.attention.packing import packing
from byway.engine.loss.cross_entropy import chunked_loss
from byway.recipe.recipe import Recipe
from byway.tasks.task import moved
from byway.train import train
from byway.train.setup import prepare
from tests.engine.attention.test_packing_rows import adapted, classifier, examples, measured
from tests.train.conftest import RecipeMaker, losses

pytestmark = pytest.mark.usefixtures("quick_picture")
CUDA = torch.device("cuda")
TOP = {"name": "lora", "rank": 4, "targets": "all-linear", "layers": "1-"}
STILL = {"name": "lora", "rank": 4, "targets": "all-linear"}
"""Without dropout, whose draws differ from device to device."""


@pytest.mark.parametrize("longer", [False, True], ids=["same", "more keys"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (8, 2, 128), (12, 12, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_gives_what_the_formula_gives(
    dtype: torch.dtype, heads: int, groups: int, size: int, causal: bool, longer: bool
) -> None:
    assert varlen._difference(varlen._Kind(CUDA, dtype, heads, groups, size, causal, longer)) < 0.01


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_packed_rows_in_16_bits_are_as_near_to_float32_as_padded_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = varlen._called
    monkeypatch.setattr(varlen, "_called", lambda *args: (calls.append(1), plain(*args))[1])
    found: dict[str, Any] = {}
    for kind, dtype in (("exact", torch.float32), ("padded", torch.bfloat16), ("packed", torch.bfloat16)):
        model = classifier(name).eval().to(CUDA, dtype)
        adapter = adapted(model)
        batch = moved((pack_labelled if kind == "packed" else pad_labelled)(examples(), 0), CUDA)
        with packing(model):
            loss, gradient = measured(model, adapter, batch)
        found[kind] = loss, gradient.float()
    assert len(calls) > 2
    apart = {kind: float((gradient - found["exact"][1]).norm()) for kind, (_, gradient) in found.items()}
    assert apart["packed"] < 1.5 * apart["padded"]


@pytest.mark.parametrize("engine", [{}, {"pack": "off", "labels_only": "off", "frontier": "off"}, {"checkpointing": "on"}])
def test_a_run_in_float32_has_the_losses_of_a_cpu(make_recipe: RecipeMaker, engine: dict[str, Any]) -> None:
    there = train(make_recipe("there", base={"device": "cuda", "dtype": "fp32"}, method=STILL, engine=engine))
    here = train(make_recipe("here", base={"device": "cpu", "dtype": "fp32"}, method=STILL, engine=engine))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(losses(there.directory), losses(here.directory), strict=True)]
    assert len(pairs) > 5
    assert all(a == pytest.approx(b, rel=2e-3) for a, b in pairs)


def test_a_run_in_bf16_keeps_every_lever_and_learns_as_without_them(make_recipe: RecipeMaker) -> None:
    base = {"device": "cuda", "dtype": "bf16"}
    levers = prepare(Recipe.from_dict(make_recipe(base=base, method=STILL)), note=print).engaged.levers
    assert levers.pack and levers.labels_only and levers.frontier
    off = {"pack": "off", "labels_only": "off", "frontier": "off", "share_prefix": "off", "recompute": "off"}
    own, plain = (train(make_recipe(name, base=base, method=STILL, engine=engine)) for name, engine in (("own", {}), ("plain", off)))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(losses(own.directory), losses(plain.directory), strict=True)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_from_the_cache_has_the_losses_of_the_live_run(make_recipe: RecipeMaker, dtype: str, tmp_path: Any) -> None:
    base = {"device": "cuda", "dtype": dtype}
    live = train(make_recipe("live", base=base, method=TOP))
    cached = train(make_recipe("cached", base=base, method=TOP, engine={"cache": str(tmp_path / "cache")}))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(losses(live.directory), losses(cached.directory), strict=True)]
    assert all(a == pytest.approx(b, rel=1e-4 if dtype == "fp32" else 0.02) for a, b in pairs)


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_8_bit_products_are_those_of_a_cpu(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 64, generator=g), torch.randn(40, 64, generator=g)
    (x_codes, _), (w_codes, _) = integers.quantized(x), integers.quantized(weight)
    expected = x_codes.long() @ w_codes.long().T
    assert torch.equal(integers.multiplied(x_codes.to(CUDA), w_codes.to(CUDA)).long().cpu(), expected)


def test_the_chunked_loss_is_that_of_all_logits() -> None:
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, 501, bias=False, device=CUDA).requires_grad_(False)
    hidden = torch.randn(37, 32, generator=g).to(CUDA).requires_grad_()
    targets = torch.randint(0, 501, (37,), generator=g).to(CUDA)
    own = chunked_loss(head, hidden, targets, rows=8)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    (a,), (b,) = torch.autograd.grad(own, hidden), torch.autograd.grad(plain, hidden)
    assert own.item() == pytest.approx(plain.item(), rel=1e-5)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_adapter_trained_there_loads_on_a_cpu(make_recipe: RecipeMaker, llama_dir: Any) -> None:
    run = train(make_recipe("there", base={"device": "cuda", "dtype": "fp32"}, method=STILL))
    model, _ = byway.load_base(str(llama_dir), "fp32", device_map="cpu")
    ids = torch.tensor([[1, 7, 9, 12]])
    before = model(ids).logits
    byway.load(model, run.directory / "adapter")
    assert not torch.equal(model(ids).logits, before)
