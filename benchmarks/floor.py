"""The physical floor: how long the arithmetic of a training step must take on this machine, however well it is arranged.

Seconds ≥ max(FLOP / peak, bytes / bandwidth). Counted for the real tokens of the step, with everything that is frozen neither
differentiated nor run where nothing needs it:

    trunk      4·P_trunk                    per token: forward 2, gradient of the input 2
    head       4·d·V · labelled share       per token
    LoRA       6·r·Σ(in + out)              per token: forward 2, gradients of input and weights 4
    attention  12·d_attention·layers        per pair of tokens that see each other: QK and PV forward 4, backward 8

``peak`` is the fastest of the matrix products of the model's own shapes, each measured five times, in the same run, dtype and number of
threads; ``bandwidth`` is reading a tensor of 256 MB; ``bytes`` are the weights, read twice for each forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["Shape", "Work", "floor_seconds", "largest", "peaks", "serve", "shape_of"]

READ_MB = 256
PRODUCT_SECONDS = 0.15
"""How long one measurement of one matrix product is to take at least."""


@dataclass(frozen=True)
class Shape:
    """What of a model counts. ``linears``: (in, out) of each kind of linear map in the trunk → how many there are."""

    linears: tuple[tuple[int, int, int], ...]
    width: int
    vocabulary: int
    layers: int
    attention_width: int
    causal: bool
    lowrank: int
    """r·Σ(in + out) over the adapted maps."""

    @property
    def trunk(self) -> int:
        """Numbers in the trunk's linear maps."""
        return sum(inside * outside * count for inside, outside, count in self.linears)

    def part(self, layers: int, trained: int) -> Shape:
        """Only the top `layers` of it are run, beside `trained` numbers; 0: a side network on states that are there already."""
        share = layers / self.layers
        linears = tuple((inside, outside, round(count * share)) for inside, outside, count in self.linears)
        return replace(self, linears=linears, layers=layers, lowrank=trained)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Shape:
        return cls(**{**given, "linears": tuple(tuple(each) for each in given["linears"])})


@dataclass(frozen=True)
class Work:
    """What one repetition has to do. ``lengths``: tokens of its rows; ``labels``: how many are learned; ``passes``: forward passes."""

    lengths: tuple[int, ...]
    labels: int
    passes: int = 1

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    def flop(self, shape: Shape) -> dict[str, float]:
        """By part, in FLOP; ``all`` is their sum."""
        pairs = sum(n * (n + 1) / 2 if shape.causal else n * n for n in self.lengths)
        parts = {
            "trunk": 4.0 * shape.trunk * self.tokens,
            "head": 4.0 * shape.width * shape.vocabulary * self.labels,
            "lora": 6.0 * shape.lowrank * self.tokens,
            "attention": 12.0 * shape.attention_width * shape.layers * pairs,
        }
        return parts | {"all": sum(parts.values())}

    def bytes(self, shape: Shape, size: int) -> float:
        """Read at least: the weights, once forward and once backward, of `size` bytes a number."""
        return 2.0 * size * (shape.trunk + shape.width * shape.vocabulary) * self.passes


def shape_of(directory: Path, rank: int) -> Shape:
    """The shape of the model in `directory` (its config.json), with LoRA of `rank` on all its linear maps."""
    import torch
    from transformers import AutoConfig

    import byway
    from byway.base.architecture import model_class
    from byway.core.families import facts
    from byway.core.weights import features

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = model_class(config, "auto", str(directory))._from_config(config)
    found = facts(model)
    counts: dict[tuple[int, int], int] = {}
    for path in (*found.attention_linears, *found.feed_forward_linears):
        size = features(model.get_submodule(path))
        counts[size] = counts.get(size, 0) + 1
    adapter = byway.attach(model, byway.LoRA(rank=rank, targets="all-linear", modules_to_save=()))
    head = model.get_submodule(found.head) if found.head else None
    width, vocabulary = features(head) if head is not None else (int(config.hidden_size), 0)
    attention = sum(inside for inside, _ in (features(model.get_submodule(p)) for p in found.attention_outputs))
    layers = sum(map(len, found.stacks.values()))
    return Shape(
        linears=tuple((*size, count) for size, count in counts.items()),
        width=width,
        vocabulary=vocabulary,
        layers=layers,
        attention_width=attention // max(layers, 1),
        causal=found.head is not None,
        lowrank=adapter.num_parameters,
    )


def peaks(shape: Shape, tokens: int, dtype: str, device: str) -> dict[str, float]:
    """GFLOP/s of x·Wᵀ for `tokens` rows and each kind of linear map, and ``bandwidth`` in GB/s; each measured once."""
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(act: Any) -> float:
        act()
        wait()
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < PRODUCT_SECONDS or count < 2:
            act()
            wait()
            count += 1
        return passed / count

    found: dict[str, float] = {}
    sizes = [(inside, outside) for inside, outside, _ in shape.linears] + ([(shape.width, shape.vocabulary)] if shape.vocabulary else [])
    for inside, outside in dict.fromkeys(sizes):
        x, w = torch.randn(tokens, inside, dtype=kind, device=device), torch.randn(outside, inside, dtype=kind, device=device)
        out = torch.empty(tokens, outside, dtype=kind, device=device)
        taken = seconds(lambda x=x, w=w, out=out: torch.mm(x, w.t(), out=out))
        found[f"{tokens}x{inside}x{outside}"] = 2.0 * tokens * inside * outside / taken / 1e9
    block = torch.zeros(READ_MB * 2**20 // 4, device=device)
    found["bandwidth"] = READ_MB * 2**20 / seconds(lambda: torch.sum(block)) / 1e9
    return found


def serve(gate: Any, settings: Mapping[str, Any]) -> None:
    """A worker whose repetitions are measurements of the peaks."""
    import torch

    torch.set_num_threads(int(settings["threads"]))
    shape = Shape.from_json(settings["shape"])
    arguments = (shape, int(settings["tokens"]), settings["dtype"], settings["device"])
    gate.ready()
    while gate.begin():
        gate.end(peaks=peaks(*arguments))
    gate.close()


def largest(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fastest product of all measurements (``gflops``), its shape's name, and the widest bandwidth (GB/s)."""
    best: dict[str, float] = {}
    for each in repetitions:
        for name, value in each["peaks"].items():
            best[name] = max(best.get(name, 0.0), value)
    bandwidth = best.pop("bandwidth")
    return {"gflops": max(best.values()), "bandwidth": bandwidth, **{name: round(value, 1) for name, value in best.items()}}


def floor_seconds(work: Work, shape: Shape, peak: Mapping[str, float], dtype: str) -> float:
    """The least time for `work`, in seconds."""
    arithmetic = work.flop(shape)["all"] / (peak["gflops"] * 1e9)
    return max(arithmetic, work.bytes(shape, {"fp32": 4, "bf16": 2}[dtype]) / (peak["bandwidth"] * 1e9))
