"""Checks 13-20: target modules and adapter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import byway
from byway.errors import AdapterError
from tests.reliability.table import Action, Case, World, check


def targets(written: str, *says: str, code: int = 2, seconds: float | None = None, options: tuple[str, ...] = ()) -> Case:
    """``byway train`` with these targets."""
    return Case(make=lambda world: world.train(f"method.targets={written}", *options), code=code, says=says, seconds=seconds)


def method(override: str, *says: str) -> Case:
    return Case(make=lambda world: world.train(f"method.{override}"), says=says)


def untouched(act: Callable[[Any], object]) -> Callable[[World], Action]:
    """Run `act` on an attached model: if it raises, tensors, flags and adapters must be as before."""

    def make(world: World) -> Action:
        model = byway.load_base(world.shared.base)[0]
        byway.load(model, world.shared.adapter, "one")

        def state() -> list[tuple[str, bytes, bool]]:
            return [
                (name, tensor.detach().numpy().tobytes(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
            ]

        before = state(), list(byway.adapters(model))

        def run() -> None:
            try:
                act(model)
            finally:
                assert (state(), list(byway.adapters(model))) == before

        return run

    return make


def detach_merged(world: World) -> Action:
    model = byway.load_base(world.shared.base)[0]
    byway.load(model, world.shared.adapter, "one")
    byway.merge(model, "one")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run() -> None:
        try:
            byway.detach(model, "one")
        finally:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    return run


def larger_vocabulary(world: World) -> Action:
    """An adapter on the embedding of a base with three more tokens."""
    model = byway.load_base(world.shared.base)[0]
    model.resize_token_embeddings(267, mean_resizing=False)
    adapter = byway.attach(model, byway.LoRA(rank=4, targets=("embed_tokens", "q_proj")))
    adapter.save(world.root / "adapter")
    return world.use("adapter")


def loads_after_resize(world: World) -> None:
    model = byway.load_base(world.shared.base)[0]
    model.resize_token_embeddings(267, mean_resizing=False)
    assert byway.load(model, world.root / "adapter", check_base=False).num_parameters


CHECKS = [
    check(
        13,
        "targets that match nothing",
        "tests/core/test_targets.py::test_the_names_that_there_are_end_at_twenty",
        list=targets("[q_prj]", "'q_prj'", "did you mean 'q_proj'?", "down_proj", "gate_proj"),
        expression=targets("'.*attention'", "'.*attention'", "no module", "q_proj"),
    ),
    check(
        14,
        "one of several patterns matches nothing",
        "tests/core/test_targets.py::test_all_problems_come_at_once",
        "tests/core/test_targets.py::test_layers_that_are_not_there_are_errors",
        target=targets("[q_proj, v_prj]", "'v_prj'", "did you mean 'v_proj'?"),
        to_save=method("modules_to_save=[zzz]", "'zzz'"),
        exclude=method("exclude=[k_prj]", "'k_prj'", "did you mean 'k_proj'?"),
        rank_pattern=method("rank_pattern={v_prj: 2}", "rank_pattern", "'v_prj'", "did you mean 'v_proj'?"),
        alpha_pattern=method("alpha_pattern={k_proj: 2}", "alpha_pattern", "'k_proj'"),
        layers=method("layers=[0, 2]", "layers 2", "2 layers"),
    ),
    check(
        15,
        "a target that is no linear map; all-linear leaves the head out and says so",
        "tests/core/test_targets.py::test_all_linear_is_every_linear_map_but_the_head",
        norm=targets("[input_layernorm]", "input_layernorm", "LlamaRMSNorm"),
        container=targets("[self_attn]", "self_attn", "LlamaAttention", "q_proj"),
        activation=targets("'.*act_fn'", "act_fn", "SiLU"),
        all_linear=targets("all-linear", "down_proj", "lm_head", code=0, options=("--dry-run",)),
    ),
    check(
        16,
        "a catastrophic, invalid or too long expression",
        "tests/core/test_targets.py::test_an_invalid_or_catastrophic_expression_ends_soon_with_a_clear_message",
        catastrophic=targets(r"'(?:a|aa|\w|\w\w|.)+[^\w.]'", "takes longer than", seconds=4),
        invalid=targets("'(.*_proj'", "'(.*_proj'", "valid regular expression"),
        long=targets(f"'{'q' * 501}'", "501", "500"),
    ),
    check(
        17,
        "an adapter made for a larger vocabulary",
        "tests/formats/test_peft.py::test_a_vocabulary_resized_before_training_comes_with_the_file",
        "tests/formats/test_strict.py::test_a_resized_vocabulary_is_recognized_and_said",
        rows=Case(make=larger_vocabulary, says=("embed_tokens", "267", "264"), then=loads_after_resize),
    ),
    check(
        18,
        "a name that is taken; taking away an adapter that is not there, or has been merged",
        "tests/core/test_core.py::test_what_is_refused_leaves_the_model_untouched",
        taken=Case(
            make=untouched(lambda model: byway.attach(model, byway.LoRA(targets=("q_proj",)), "one")),
            error=AdapterError,
            says=("'one'", "already attached"),
        ),
        unknown=Case(make=untouched(lambda model: byway.detach(model, "two")), error=AdapterError, says=("'two'", "one")),
        near=Case(make=untouched(lambda model: byway.activate(model, "onw")), error=AdapterError, says=("'onw'", "did you mean 'one'?")),
        merged=Case(make=detach_merged, error=AdapterError, says=("'one'", "none")),
    ),
    check(
        19,
        "names of adapters that look like something else",
        "tests/formats/test_strict.py::test_any_allowed_name_makes_the_round_trip",
        "tests/methods/test_contract.py::test_any_allowed_adapter_name_works",
        **{
            repr(name): Case(
                make=untouched(lambda model, name=name: byway.attach(model, byway.LoRA(targets=("q_proj",)), name)),
                error=AdapterError,
                says=("not allowed", "letter or digit"),
            )
            for name in ("", ".", "..", "a/b", "a.b", "a" * 65, "ä", "-a", "a\n")
        },
    ),
    check(
        20,
        "a rank larger than the map",
        "tests/methods/test_lora.py::test_a_rank_that_the_module_cannot_use_is_refused_before_anything_is_touched",
        rank=method("rank=33", "33", "32"),
        pattern=method("rank_pattern={v_proj: 17}", "v_proj", "17", "16"),
    ),
]
