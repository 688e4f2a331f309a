"""Checks 1-12: recipe and command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byway.errors import AdapterError
from byway.recipe.recipe import Recipe
from tests.reliability.table import Action, Case, World, check

SOUND = "method: {name: lora}\ndata: {train: x.jsonl}\noutput: run\n"


def text(content: str | bytes, *says: str, code: int = 2, command: str = "train") -> Case:
    """A recipe file with this content."""
    return Case(make=lambda world: [command, world.write("recipe.yaml", content)], code=code, says=says, seconds=2)


def value(override: str, *says: str) -> Case:
    """A valid recipe with one value replaced and a base that cannot be loaded: the error must come before loading."""

    def make(world: World) -> Action:
        return world.train(override, base={"model": world.hollow()})

    return Case(make=make, says=says or (override.partition("=")[0],))


def both(method: str, fields: dict[str, Any], *says: str, **sections: Any) -> Case:
    """A valid recipe with another method that does not fit its other settings."""

    def make(world: World) -> Action:
        arguments = world.train(**sections)
        path = Path(arguments[1])
        recipe = json.loads(path.read_text())
        path.write_text(json.dumps(recipe | {"method": {"name": method} | fields}))
        return arguments

    return Case(make=make, says=says)


def without_lr() -> str:
    return SOUND.replace("output", "train: {lr: 1e-4}\noutput")


def reads_rate(world: World) -> Action:
    path = world.write("recipe.yaml", without_lr())
    return lambda: print(f"the rate is {Recipe.load(path).train.learning_rate * 10}")


def bomb() -> str:
    layers = [f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)]
    return "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(layers)


def accepted(change: Callable[[bytes], bytes]) -> Case:
    """A valid recipe whose bytes are changed in ways that must not matter."""

    def make(world: World) -> Action:
        arguments = world.train()
        path = Path(arguments[1])
        path.write_bytes(change(json.dumps(json.loads(path.read_text()), indent=1).encode()))
        return ["data", str(path)]

    return Case(make=make, code=0, says=("3 of 3 rows used",))


def full_output(world: World) -> Action:
    world.write("run/thesis.tex", "years of work")
    return world.train("--overwrite")


def output_of_a_run(world: World) -> list[str]:
    world.own_run()
    return world.train()


def output_is_a_file(world: World) -> Action:
    world.write("run", "x")
    return world.train()


def output_in_the_base(world: World) -> Action:
    base = world.own_base()
    return world.train(f"output={base}/run", base={"model": str(base)})


def base_without(*files: str) -> Callable[[World], Action]:
    def make(world: World) -> Action:
        base = world.own_base()
        for file in files:
            (base / file).unlink()
        return world.train(base={"model": "base"})

    return make


def broken_config(world: World) -> Action:
    base = world.own_base()
    (base / "config.json").write_text('{"model_type": "llama", ')
    return world.train(base={"model": "base"})


def attach_after_shard(world: World) -> Action:
    """A process group of one rank, in memory: no sockets."""
    from torch import distributed
    from torch._C._distributed_c10d import HashStore

    import byway

    model = byway.load_base(world.shared.base)[0]

    def act() -> None:
        distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            byway.attach(model, byway.LoRA(targets=("q_proj",)))
        finally:
            distributed.destroy_process_group()

    return act


CHECKS = [
    check(
        1,
        "an unknown key, at the top and in a section",
        "tests/recipe/test_recipe.py::test_an_unknown_key_shows_the_nearest",
        "tests/recipe/test_recipe.py::test_every_problem_is_reported_at_once_in_the_order_of_the_lines",
        top=text(SOUND + "trian: {}\n", "recipe.yaml:4", "'trian'", "did you mean 'train'?"),
        method=text(SOUND.replace("lora}", "lora, lora_aplha: 3}"), "recipe.yaml:1", "'method.lora_aplha'", "did you mean 'lora_alpha'?"),
        override=value("train.epoch=3", "'train.epoch'", "did you mean 'epochs'?"),
    ),
    check(
        2,
        "a key that stands twice",
        twice=text("method:\n  name: lora\n  r: 4\n  alpha: 8\n  r: 8\n", "recipe.yaml:5:3", "'r'", "line 3"),
    ),
    check(
        3,
        "lr: 1e-4 is a number; a wrong type is an error",
        "tests/recipe/test_yaml12.py::test_scalars_follow_the_core_schema",
        number=Case(make=reads_rate, code=0, says=("the rate is 0.001",)),
        word=text(SOUND + "train: {learning_rate: fast}\n", "recipe.yaml:4", "learning_rate", "'fast'", "number"),
        list=text(SOUND + "train: {lr: [1e-4]}\n", "recipe.yaml:4", "lr", "number"),
    ),
    check(
        4,
        "bias: no and bias: false where one of several words is wanted",
        no=text(SOUND.replace("lora}", "lora, bias: no}"), "method.bias", "'no'", "none", "all", "lora_only"),
        false=text(SOUND.replace("lora}", "lora, bias: false}"), "method.bias", "false", "none", "all", "lora_only"),
    ),
    check(
        5,
        "a tag that asks for an object",
        apply=text("method: !!python/object/apply:os.system ['touch ran']\n", "recipe.yaml:1:9", "!!python/object/apply:os.system"),
        name=text("method: !!python/name:os.system\n", "recipe.yaml:1:9", "!!python/name:os.system"),
    ),
    check(
        6,
        "an alias bomb, 3,000 levels, 20 MB",
        "tests/recipe/test_yaml12.py::test_bombs_are_refused_quickly_and_in_little_memory",
        bomb=text(bomb(), "recipe.yaml", "20,000 values"),
        lists=text("[" * 3000 + "]" * 3000, "recipe.yaml:1:", "deep"),
        blocks=text("- " * 3000, "recipe.yaml:1:", "deep"),
        large=text("a: x\n" * (4 * 2**20), "recipe.yaml", "bytes"),
    ),
    check(
        7,
        "a file that is no recipe, or is one in another encoding",
        empty=text("", "recipe.yaml:1:1", "empty"),
        list=text("- a\n", "recipe.yaml:1:1", "list"),
        tab=text("method:\n\tname: lora\n", "recipe.yaml:2:1", "tab"),
        nul=text("a: 1\nb: \0", "recipe.yaml:2:4", "U+0000"),
        utf16=text("a: 1".encode("utf-16"), "recipe.yaml:1:1", "UTF-16"),
        not_a_file=Case(make=lambda world: ["train", "recipe.yml"], says=("'recipe.yml' does not exist",)),
        bom=accepted(lambda content: b"\xef\xbb\xbf" + content),
        crlf=accepted(lambda content: content.replace(b"\n", b"\r\n")),
    ),
    check(
        8,
        "a value out of type or range",
        "tests/recipe/test_recipe.py::test_a_value_out_of_type_or_range_names_its_key",
        **{
            f"{key.partition('.')[2]} {given}": value(f"{key}={given}")
            for key, values in {
                "method.rank": ("0", "-4", "'4'", "4.5", "true", "null"),
                "method.dropout": ("2.0", ".nan", "-0.1"),
                "method.alpha": (".nan", ".inf", "'x'", "true"),
                "train.learning_rate": ("-1e-4", "0", ".nan", ".inf"),
                "train.rows_per_step": ("0", "-1", "1.5"),
                "train.epochs": ("0", "-1", ".nan", ".inf"),
            }.items()
            for given in values
        },
        **{"rank 1000000": Case(make=lambda world: world.train("method.rank=1000000"), says=("method.rank", "1000000", "65,536"))},
    ),
    check(
        9,
        "two values that cannot be together",
        "tests/recipe/test_recipe.py::test_an_impossible_pair_names_both",
        "tests/recipe/test_aliases.py::test_two_spellings_of_one_key_are_an_error_that_names_both",
        "tests/methods/test_ladder_backbone.py::test_caches_that_cannot_grow_or_are_out_of_step_are_refused",
        fp16_and_bf16=text(SOUND + "train: {fp16: true, bf16: true}\n", "fp16", "bf16"),
        fp16_on_a_cpu=value("base.dtype=fp16", "base.dtype", "fp16", "base.device", "cpu"),
        two_step_sizes=value("train.tokens_per_step=64", "train.tokens_per_step", "train.rows_per_step"),
        resume_and_overwrite=Case(make=lambda world: world.train("--resume", "--overwrite"), says=("--resume", "--overwrite")),
        full_in_4_bit=both("full", {}, "base.quantize", "nf4", "method.name", "full", base={"quantize": "nf4"}),
        dora_on_a_norm=both("dora", {"targets": ["norm"]}, "'norm'", "LlamaRMSNorm"),
        an_approximation_of_nothing=value("engine.cache_dtype=int8", "engine.cache_dtype", "engine.cache is off"),
    ),
    check(
        10,
        "an output directory that cannot be used",
        "tests/recipe/test_checks.py::test_an_output_without_permission_is_refused",
        foreign=Case(make=full_output, says=("'run'", "thesis.tex")),
        a_run=Case(make=output_of_a_run, says=("'run'", "already contains a run", "--resume", "--overwrite")),
        a_file=Case(make=output_is_a_file, says=("'run'", "is a file")),
        inside_the_base=Case(make=output_in_the_base, says=("base/run", "inside the base")),
    ),
    check(
        11,
        "a base that is missing, broken or out of reach",
        "tests/base/test_base_hub.py::test_without_network_the_error_is_quick_and_names_the_id",
        "tests/base/test_base_hub.py::test_a_server_that_never_answers_costs_seconds",
        missing=Case(make=lambda world: world.train(base={"model": "./bse"}), says=("bse", "exist"), seconds=5),
        no_config=Case(make=base_without("config.json"), says=("base", "config.json"), seconds=5),
        no_weights=Case(make=base_without("model.safetensors"), says=("base", "safetensors"), seconds=5),
        broken_config=Case(make=broken_config, says=("config.json",), seconds=5),
        no_tokenizer=Case(make=base_without("tokenizer.json", "tokenizer_config.json"), says=("tokenizer",), seconds=5),
        hub_id_offline=Case(
            make=lambda world: world.train(base={"model": "owner/no-such-model"}), says=("owner/no-such-model",), seconds=5
        ),
        data=Case(make=lambda world: world.train("data.train=trian.jsonl"), says=("data.train", "did you mean 'train.jsonl'?"), seconds=5),
    ),
    check(
        "11b",
        "another attention function after attach; attach after sharding; a site that never runs",
        "tests/engine/attention/test_packing.py::test_choosing_another_implementation_after_attach_is_an_error_and_detach_still_works",
        "tests/core/test_core.py::test_a_dead_site_is_named_at_the_first_forward_and_an_unused_branch_is_no_error",
        sharded=Case(make=attach_after_shard, error=AdapterError, says=("fully_shard", "attach first")),
    ),
    check(
        "11c",
        "a 4-bit base that was evaluated before it is trained and merged",
        "tests/ecosystem/test_quantized.py::test_evaluating_and_generating_before_training_and_merging_changes_no_bit",
        "tests/base/test_base_quant.py::test_gradients_after_an_evaluation_are_those_without_one",
    ),
    check(
        12,
        "--dry-run shows and writes nothing",
        recipe=Case(
            make=lambda world: world.train("--dry-run", "method.alpha=3"),
            code=0,
            says=(
                "rank: 4",
                "alpha: 3",
                "self_attn.q_proj",
                "self_attn.v_proj",
                "trained",
                "896",
                "dry run",
            ),
        ),
        over_a_run=Case(make=lambda world: [*output_of_a_run(world), "--dry-run", "--overwrite"], code=0, says=("trained", "dry run")),
    ),
]
