"""Checks 47-52: training and merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

import byway
from byway.errors import AdapterError
from byway.train.checkpoint import newest
from tests.reliability.table import Action, Case, Later, World, check

EXPLODES = (
    "train.learning_rate=100",
    "method.plus_ratio=1e6",
    "method.alpha=1e6",
    "train.weight_decay=1e6",
    "train.max_grad_norm=null",
    "train.warmup_ratio=0",
    "train.schedule=constant",
    "method.targets=all-linear",
)


def is_kept(world: World) -> None:
    """The log shows the non-finite loss, the checkpoint before it is complete, and there is no final adapter."""
    rows = [json.loads(line) for line in (world.root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["nonfinite"] is True and rows[-1]["loss"] is None
    path, problems = newest(world.root / "run" / "checkpoints")
    assert path is not None and path.name == f"step-{rows[-1]['step'] - 1}" and not problems
    assert not (world.root / "run" / "adapter").exists()


def attached(world: World) -> Any:
    model = byway.load_base(world.shared.base)[0]
    return byway.load(model, world.shared.adapter).model


def after_merge(act: Callable[[World, Any, byway.Adapter], object]) -> Callable[[World], Action]:
    """Run `act` after the adapter was merged: if it raises, the weights stay as the merge left them."""

    def make(world: World) -> Action:
        model = attached(world)
        adapter = byway.adapters(model)["default"]
        byway.merge(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def run() -> None:
            try:
                act(world, model, adapter)
            finally:
                assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

        return run

    return make


def merged_in_inference_mode(world: World) -> Action:
    def act() -> None:
        one, two = attached(world), attached(world)
        byway.merge(one)
        with torch.inference_mode():
            byway.merge(two)
        left, right = one.state_dict(), two.state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        base = byway.load_base(world.shared.base)[0].state_dict()
        assert any(not torch.equal(base[name], left[name]) for name in base)
        print("equal")

    return act


def merged_as(*options: str) -> Callable[[World], Action]:
    return lambda world: ["merge", str(world.own_adapter()), "--base", str(world.own_base()), "-o", "merged", *options]


CHECKS = [
    check(
        47,
        "the loss becomes NaN",
        "tests/train/test_loop.py::test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows",
        rate=Case(
            make=lambda world: world.train(*EXPLODES),
            code=3,
            says=("the loss is nan at step 2", "train.jsonl:", "learning_rate", "checkpoints/step-1", "--resume"),
            writes=True,
            then=is_kept,
        ),
    ),
    check(
        48,
        "a gradient that is not finite",
        "tests/train/test_loop.py::test_a_gradient_that_is_not_finite_is_not_used_and_counted",
        "tests/train/test_loop.py::test_five_gradients_in_a_row_that_are_not_finite_stop_the_run",
    ),
    check(
        49,
        "the base after training",
        "tests/train/test_loop.py::test_the_base_is_bit_identical_after_training",
        "tests/methods/test_contract.py::test_frozen_tensors_are_bit_identical_after_training",
        "tests/ecosystem/test_quantized.py::test_training_leaves_the_quantized_base_bit_for_bit",
    ),
    check(
        50,
        "accumulation over uneven rows; the last, smaller step",
        "tests/train/test_loop.py::test_the_run_equals_a_plain_loop_over_transformers_own_loss",
        "tests/data/test_batches.py::test_rows_per_step_is_exact_but_for_the_last",
    ),
    check(
        51,
        "merge twice, save what is merged, copy, merge in inference mode",
        "tests/methods/test_contract.py::test_merged_equals_unmerged",
        "tests/methods/test_contract.py::test_copies_keep_the_side_paths_and_are_independent",
        "tests/formats/test_peft.py::test_saving_loading_and_saving_again_changes_no_bit",
        twice=Case(make=after_merge(lambda world, model, adapter: byway.merge(model)), error=AdapterError, says=("'default'", "none")),
        saved=Case(
            make=after_merge(lambda world, model, adapter: adapter.save(world.root / "saved")),
            error=AdapterError,
            says=("'default'", "merged or detached", "save it before"),
        ),
        inference_mode=Case(make=merged_in_inference_mode, code=0, says=("equal",)),
        onto_the_base=Case(
            make=lambda world: ["merge", str(world.own_adapter()), "--base", str(world.own_base()), "-o", "base"],
            says=("base", "which the merge reads"),
        ),
    ),
    check(
        52,
        "merging into a quantized base",
        "tests/ecosystem/test_quantized.py::test_merging_gives_ordinary_maps_that_hold_the_dequantized_weight_plus_the_update",
        "tests/ecosystem/test_quantized.py::test_a_16_bit_merge_of_a_4_bit_map_keeps_a_small_update",
        "tests/workshop/test_merge_files.py::test_an_adapter_trained_beside_a_quantized_base_is_folded_into_the_dequantized_weights",
        Later("writing a merge back into 4 or 8 bits does not exist yet: there is no option for it, so it cannot happen unasked"),
        quantize=Case(make=merged_as("--quantize", "nf4"), says=("--quantize",)),
        dtype=Case(make=merged_as("--dtype", "int8"), says=("int8", "bf16")),
    ),
]
