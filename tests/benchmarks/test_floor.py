"""The floor's arithmetic and the rows' order, against counts made by other means."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import floor  # pyright: ignore[reportMissingImports]

    yield floor
    sys.modules.pop("floor", None)


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import chats  # pyright: ignore[reportMissingImports]

    yield chats
    sys.modules.pop("chats", None)


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_the_flops_are_those_that_torch_counts(floor, tmp_path, seed):
    config = LlamaConfig(vocab_size=96, tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    shape = floor.shape_of(tmp_path, rank=4)
    assert shape.trunk == sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    assert (shape.width, shape.vocabulary, shape.layers, shape.attention_width, shape.causal) == (32, 96, 3, 32, True)
    assert shape.lowrank == sum(4 * sum(p.shape) for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    model.requires_grad_(False)
    rows = torch.randint(0, 96, (2, 24))
    hidden = model.get_input_embeddings()(rows).requires_grad_()  # so that the gradient of every input is formed, and of no weight
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden, labels=rows).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    by_name = {str(key): value for key, value in counts.items()}
    work = floor.Work((24, 24), labels=48)
    flop = work.flop(shape)
    assert by_name["aten.mm"] == flop["trunk"] + flop["head"]
    # eager attention computes all pairs, the masked ones too; the floor counts only those that see each other
    everything = 12 * shape.attention_width * shape.layers * 2 * 24 * 24
    assert by_name["aten.bmm"] == everything
    assert flop["attention"] == everything * (24 * 25 / 2) / (24 * 24)


def test_the_floor_is_the_larger_of_arithmetic_and_reading(floor):
    shape = floor.Shape(linears=((10, 10, 3),), width=10, vocabulary=20, layers=1, attention_width=10, causal=True, lowrank=0)
    work = floor.Work((100,), labels=0, passes=2)
    flop = 4 * 300 * 100 + 12 * 10 * 5050
    assert work.flop(shape)["all"] == flop
    assert floor.floor_seconds(work, shape, {"gflops": 1e-6, "bandwidth": 1e9}, "fp32") == pytest.approx(flop / 1e3)
    assert floor.floor_seconds(work, shape, {"gflops": 1e9, "bandwidth": 1e-6}, "bf16") == pytest.approx(2 * 2 * 500 * 2 / 1e3)


def test_the_largest_of_the_measured_peaks_counts(floor):
    repetitions = [{"peaks": {"4x4x4": 5.0, "4x4x8": 7.0, "bandwidth": 1.0}}, {"peaks": {"4x4x4": 9.0, "4x4x8": 6.0, "bandwidth": 2.0}}]
    assert floor.largest(repetitions) == {"gflops": 9.0, "bandwidth": 2.0, "4x4x4": 9.0, "4x4x8": 7.0}


def test_byways_shuffle_brings_the_rows_into_their_order(chats):
    from byway.data.batches import plan_epoch

    rows = [chats.Row((number,), (number,)) for number in range(24)]
    placed = chats.for_byway(rows, seed=3)
    assert placed != rows
    steps = plan_epoch([1] * 24, epoch=0, seed=3, rows_per_step=4, micro_tokens=100, pack=True)
    seen = [sorted(placed[i].input_ids[0] for micro in step for i in micro) for step in steps]
    assert seen == [list(range(start, start + 4)) for start in range(0, 24, 4)]


def test_the_steps_that_are_timed_are_like_all_of_them(chats):
    drawn = random.Random(0)
    rows = [chats.Row((1,) * n, (-100, *(1,) * (n - 1))) for n in (drawn.randrange(10, 500) for _ in range(200))]
    chosen, described = chats.representative(rows, 3)
    assert len(chosen) == 3
    for key in ("tokens_per_step", "real_share_padded"):
        assert described[key] == pytest.approx(described[f"all_{key}"], rel=0.05)


def test_random_rows_are_as_long_as_the_chats(chats):
    rows = chats.make_rows(Path("nowhere"), "tiny-shape", 64, fixed=False, vocabulary=100)
    assert len(rows) == 200
    assert max(row.tokens for row in rows) == 64
    assert all(1 <= row.learned < row.tokens for row in rows)
    fixed = chats.make_rows(Path("nowhere"), "tiny-shape", 64, fixed=True, vocabulary=100)
    assert {(row.tokens, row.learned) for row in fixed} == {(256, 255)}
