"""A recipe as a whole: the contract's keys, strict types, every problem at once, overrides, round trips."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import byway
from byway.core.registry import IMPORT_PATH
from byway.errors import ConfigError
from byway.recipe.names import adapter_names, method_name
from byway.recipe.recipe import Recipe
from byway.recipe.schema import schema
from byway.recipe.sections import Base, Data, Engine, Train

CONTRACT = """\
base:   {model: smollm2-135m-instruct, dtype: bf16, quantize: nf4}
method: {name: lora, rank: 16, alpha: 32, dropout: 0.05, targets: all-linear}
data:   {train: chat.jsonl, eval: held_out.jsonl, task: chat, max_length: 1024, learn: responses}
train:  {epochs: 1, max_steps: null, learning_rate: 2e-4, tokens_per_step: 8192, rows_per_step: null,
         warmup_ratio: 0.03, schedule: cosine, seed: 0}
engine: {pack: auto, labels_only: auto, frontier: auto, cache: off, checkpointing: auto, compile: off}
output: runs/first
"""
SMALL = {"method": {"name": "lora"}, "data": {"train": "x.jsonl"}, "output": "runs/x"}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, *overrides: str) -> Recipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return Recipe.load("r.yaml", overrides)

    return loaded


def refusal(load: Any, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def with_(section: str, **values: Any) -> dict[str, Any]:
    return SMALL | {section: {**SMALL.get(section, {}), **values}}  # type: ignore[dict-item]


def test_the_contract_is_read_as_it_stands(load: Any) -> None:
    recipe = load(CONTRACT)
    assert recipe.base == Base(model="smollm2-135m-instruct", dtype="bf16", quantize="nf4")
    assert recipe.method == (byway.LoRA(rank=16, alpha=32, dropout=0.05, targets="all-linear"),)
    assert recipe.data.train == "chat.jsonl" and recipe.data.eval == "held_out.jsonl" and recipe.data.max_length == 1024
    assert recipe.train.learning_rate == 2e-4 and recipe.train.tokens_per_step == 8192 and recipe.train.rows_per_step is None
    assert recipe.engine == Engine() and recipe.output == "runs/first" and recipe.notes == ()


def test_the_resolved_recipe_reads_back_equal(load: Any) -> None:
    several = CONTRACT.replace(
        "method: {", "method:\n  - {name: lora, rank: 4, rank_pattern: {'layers.0.*': 2}, layers: [0, '1-']}\n  - {", 1
    )
    for text in (CONTRACT, several):
        recipe = load(text)
        again = load(recipe.to_yaml())
        assert again == recipe and hash(again.method) == hash(recipe.method) and again.to_yaml() == recipe.to_yaml()
        assert pickle.loads(pickle.dumps(recipe)) == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert [m.rank for m in load(several).method] == [4, 16]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.from_dict(SMALL)
    with pytest.raises(AttributeError):
        recipe.output = "y"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        recipe.train.seed = 3  # type: ignore[misc]


def test_objects_and_paths_are_taken_from_python() -> None:
    lora = byway.LoRA(rank=3, targets=["q_proj"])
    recipe = Recipe.from_dict({"method": lora, "data": {"train": [Path("a.jsonl")]}, "output": Path("runs/x"), "train": Train(seed=4)})
    assert recipe.method == (lora,) and recipe.data.train == ("a.jsonl",) and recipe.output == "runs/x" and recipe.train.seed == 4
    assert Recipe(method=lora, data=Data(train="a"), output="x").method == (lora,)  # type: ignore[arg-type]
    changed = Recipe.from_dict({"method": [lora, lora], "data": {"train": "a"}, "output": "x"}, ["method.1.rank=5"])
    assert [m.rank for m in changed.method] == [3, 5] and changed.method[1].targets == ("q_proj",)  # type: ignore[attr-defined]


def test_both_step_sizes_unset_means_8192_tokens() -> None:
    assert Train().tokens_per_step == 8192 and Train().rows_per_step is None
    assert Train(rows_per_step=4).tokens_per_step is None
    assert Train().warmup_ratio == 0.03 and Train(warmup_steps=0).warmup_ratio is None


# One row: section, key, value, a part of the message. Check 8 and its neighbours.
BAD = [
    ("method", "rank", 0, "from 1 to"), ("method", "rank", -4, "from 1 to"), ("method", "rank", "4", "an integer"),
    ("method", "rank", 4.0, "an integer"), ("method", "rank", True, "an integer"), ("method", "dropout", 2.0, "dropout"),
    ("method", "dropout", float("nan"), "a number"), ("method", "alpha", None, "a number"), ("method", "alpha", float("inf"), "a number"),
    ("method", "bias", "no", "none, all or lora_only"), ("method", "bias", False, "none, all or lora_only"),
    ("method", "targets", 5, "a string, a list of strings or null"), ("method", "targets", ["q_proj", 5], "[1] is 5; it must be a string"),
    ("method", "rank_pattern", {"q_proj": 0}, "['q_proj'] is 0; it must be an integer from 1 to"), ("method", "layers", True, "a string"),
    ("method", "lora_bias", "yes", "true or false"), ("method", "plus_ratio", 0, "> 0 and ≤"), ("method", "blocks", [], "blocks is []"),
    ("train", "learning_rate", -1.0, "> 0"), ("train", "learning_rate", "1e-4", "a number"), ("train", "learning_rate", 0, "> 0"),
    ("train", "learning_rate", True, "a number"), ("train", "rows_per_step", 0, "from 1 to"), ("train", "epochs", 0, "> 0"),
    ("train", "epochs", float("inf"), "> 0"), ("train", "schedule", "cosin", "cosine, linear or constant"),
    ("train", "seed", -1, "from 0 to"), ("train", "warmup_ratio", 1.0, "< 1"), ("train", "tensorboard", "yes", "true or false"),
    ("train", "micro_batch_tokens", "many", "auto or an integer"), ("train", "adam_beta2", 1.0, "< 1"),
    ("data", "max_length", 1, "from 2 to"), ("data", "train", [], "a non-empty list"), ("data", "train", "", "a non-empty string"),
    ("data", "eval_fraction", 1.0, "< 1"), ("data", "labels", ["one"], "at least 2 entries"),
    ("data", "columns", {"a": 1}, "['a'] is 1; it must be a string"), ("data", "columns", 1, "a map of strings to strings"),
    ("data", "learn", "first", "responses, last or all"), ("data", "task", "image", "does not exist yet"),
    ("data", "task", "speech", "chat, classification or text, or an import path"), ("data", "task", "a.b:", "an import path"),
    ("base", "dtype", "fp8", "auto, fp32, bf16 or fp16"),
    ("base", "quantize", "nf3", "int8, nf4 or null"), ("base", "model", None, "a non-empty string"),
    ("engine", "pack", True, "auto, on or off"),
    ("engine", "cache", "on", "off, auto or a directory"), ("engine", "cache_dtype", "fp8", "same, bf16 or int8"),
    ("engine", "compile", "on", "does not exist yet"), ("method", "name", "dorra", "there is no method 'dorra'"),
    ("method", "name", 4, "name of a method"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value", "part"), BAD)
def test_a_value_out_of_type_or_range_names_its_key(section: str, key: str, value: Any, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(with_(section, **{key: value}))
    assert f"{section}.{key}" in caught.value.message and part in caught.value.message
    assert "problems" not in caught.value.message and caught.value.exit_code == 2


def test_whole_numbers_are_numbers() -> None:
    recipe = Recipe.from_dict(with_("method", alpha=16) | {"train": {"learning_rate": 1, "epochs": 3}})
    assert recipe.method[0].alpha == 16.0 and recipe.train.epochs == 3.0  # type: ignore[attr-defined]


CONTRADICTIONS = [
    ({"train": {"tokens_per_step": 4, "rows_per_step": 4}}, ("tokens_per_step", "rows_per_step")),
    ({"train": {"warmup_ratio": 0.1, "warmup_steps": 4}}, ("warmup_ratio", "warmup_steps")),
    ({"train": {"max_steps": 4, "warmup_steps": 4}}, ("max_steps", "warmup_steps")),
    ({"train": {"patience": 2}}, ("train.patience", "data.eval")),
    ({"train": {"eval_every": 2}}, ("train.eval_every", "data.eval")),
    ({"base": {"dtype": "fp16", "device": "cpu"}}, ("base.dtype", "base.device")),
    ({"data": {"train": "x", "eval": "y", "eval_fraction": 0.1}}, ("data.eval", "data.eval_fraction")),
    ({"data": {"train": "x", "eval_limit": 4}}, ("data.eval_limit", "data.eval")),
    ({"data": {"train": "x", "labels": ["a", "a"], "task": "classification"}}, ("data.labels", "twice")),
    ({"bf16": True, "fp16": True}, ("bf16", "fp16")),
]


@pytest.mark.parametrize(("values", "names"), CONTRADICTIONS)
def test_an_impossible_pair_names_both(values: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(SMALL | values)
    assert all(name in caught.value.message for name in names)


def test_the_sections_check_themselves_in_python() -> None:
    for make in (
        lambda: Train(epochs=0),
        lambda: Train(epochs="1"),  # type: ignore[arg-type]
        lambda: Train(tokens_per_step=1, rows_per_step=1),
        lambda: byway.LoRA(rank="4"),  # type: ignore[arg-type]
        lambda: byway.LoRA(rank=True),
        lambda: byway.LoRA(alpha=float("nan")),
        lambda: byway.AdaLoRA(rank=8, initial_rank=4),
        lambda: Recipe(method=(), data=Data(train="x"), output="x"),
        lambda: Recipe(method=(byway.LoRA(),), data=Data(train="x"), output=" "),
        lambda: Recipe(method=(byway.LoRA(),), data=Data(train="x"), train=Train(patience=1), output="x"),
    ):
        with pytest.raises(ConfigError):
            make()


def test_every_problem_is_reported_at_once_in_the_order_of_the_lines(load: Any) -> None:
    message = refusal(
        load,
        "method: {name: lora, rank: '4', targts: x}\ndata: {train: x, format: jsonl}\ntrain:\n  epochs: 0\n  seed: x\nfoo: 1\n",
    )
    lines = message.splitlines()
    assert lines[0] == "7 problems in r.yaml:"
    assert lines[1] == "  output is missing (name a directory for the run, for instance 'output: runs/first')"
    for line, part in zip(
        lines[2:],
        ["1: unknown key 'method.targts'", "1: method.rank", "2: data.format", "4: train.epochs", "5: train.seed", "6: unknown"],
        strict=True,
    ):
        assert line.startswith(f"  r.yaml:{part}")


UNKNOWN = [
    ("lora_aplha: 3", "'lora_aplha'", "did you mean 'lora_alpha'?"),
    ("trian: {}", "'trian'", "did you mean 'train'?"),
    ("rank: 3", "'rank'", "write it under method"),
    ("train: {epoch: 3}", "'train.epoch'", "did you mean 'epochs'?"),
    ("train: {rank: 3}", "'train.rank'", "it belongs to method"),
    ("train: {lora_aplha: 3}", "'train.lora_aplha'", "did you mean 'method.lora_alpha'?"),
    ("base: {modle: x}", "'base.modle'", "did you mean 'model'?"),
    ("engine: {flash: on}", "'engine.flash'", "engine has: cache, cache_dtype, cache_limit_gb, checkpointing"),
    ("zzz: 1", "'zzz'", "a recipe has: base, method"),
    ("model: {arch: x}", "'model.arch'", "did you mean"),
]


@pytest.mark.parametrize(("text", "key", "hint"), UNKNOWN)
def test_an_unknown_key_shows_the_nearest(load: Any, text: str, key: str, hint: str) -> None:
    message = refusal(load, f"method: {{name: lora}}\ndata: {{train: x}}\noutput: y\n{text}\n")
    assert f"r.yaml:4: unknown key {key}" in message and hint in message


def test_an_unknown_key_of_a_method_shows_the_nearest(load: Any) -> None:
    message = refusal(load, "method: {name: lora, lora_aplha: 3}\ndata: {train: x}\noutput: y\n")
    assert "r.yaml:1: unknown key 'method.lora_aplha'" in message and "did you mean 'lora_alpha'?" in message


SHAPES = [
    ("", "r.yaml:1:1: the recipe is empty"),
    ("# nothing\n", "r.yaml:1:1: the recipe is empty"),
    ("- a\n", "r.yaml:1:1: the recipe holds a list"),
    ("text\n", "r.yaml:1:1: the recipe is not a map"),
    ("method: lora\ndata: {train: x}\noutput: y\n", "r.yaml:1: method is 'lora'; it must be a map or a list of maps"),
    ("method: []\ndata: {train: x}\noutput: y\n", "method is an empty list"),
    ("method: [lora]\ndata: {train: x}\noutput: y\n", "r.yaml:1: method.0 is 'lora'; it must be a map"),
    ("method: {rank: 3}\ndata: {train: x}\noutput: y\n", "method.name is missing"),
    ("method: [{name: lora}, {rank: 3}]\ndata: {train: x}\noutput: y\n", "method.1.name is missing"),
    ("method: {name: lora}\ndata: x\noutput: y\n", "r.yaml:2: data is 'x'; it must be a map"),
    ("method: {name: lora}\ndata: {train: x}\noutput: [y]\n", "r.yaml:3: output is ['y']"),
    ("method: {name: lora}\ndata:\noutput: y\n", "data.train is missing"),
]


@pytest.mark.parametrize(("text", "part"), SHAPES)
def test_a_recipe_of_the_wrong_shape_says_where(load: Any, text: str, part: str) -> None:
    assert part in refusal(load, text)


def test_a_missing_file_shows_its_nearest_sibling(load: Any) -> None:
    load(CONTRACT)
    with pytest.raises(ConfigError, match=r"'r\.yml' does not exist\nhint: did you mean 'r\.yaml'"):
        Recipe.load("r.yml")
    with pytest.raises(ConfigError, match="is a directory"):
        Recipe.load(".")


def test_overrides_take_the_place_of_what_the_file_says(load: Any) -> None:
    recipe = load(
        CONTRACT, "train.epochs=3", "method.rank=4", "method.0.alpha=1", "output=x", "train.learning_rate=1e-5", "data.labels=null",
        "lora_dropout=0.5", "data.train=[a, b]", "train.tokens_per_step=null", "train.rows_per_step=7",
    )  # fmt: skip
    assert recipe.train.epochs == 3 and recipe.output == "x" and recipe.train.learning_rate == 1e-5 and recipe.train.rows_per_step == 7
    assert recipe.method == (byway.LoRA(rank=4, alpha=1, dropout=0.5, targets="all-linear"),) and recipe.data.train == ("a", "b")


def test_an_override_of_a_whole_section_replaces_it(load: Any) -> None:
    recipe = load(CONTRACT, "method={name: lora}", "train={seed: 3}")
    assert recipe.method == (byway.LoRA(),) and recipe.train == Train(seed=3)
    assert [m.rank for m in load(CONTRACT, "method=[{name: lora}, {name: lora, rank: 3}]").method] == [8, 3]


def test_a_later_override_wins(load: Any) -> None:
    assert load(CONTRACT, "train.seed=3", "train.seed=4").train.seed == 4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.epoch=3", "did you mean 'epochs'?"),
        ("trian.epochs=3", "did you mean 'train'?"),
        ("nonsense", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("train.seed=[", "override 'train.seed=['"),
        ("train.seed='3'", "train.seed is '3'"),
        ("method.1.rank=3", "the recipe has 1 method"),
        ("data.columns.prompt=q", "give the whole value: data.columns={...}"),
        ("train=5", "it must be a map"),
    ],
)
def test_a_bad_override_is_named(load: Any, override: str, part: str) -> None:
    message = refusal(load, CONTRACT, override)
    assert f"override {override!r}" in message and part in message


def test_with_several_methods_an_override_says_which(load: Any) -> None:
    text = CONTRACT.replace("method: {", "method:\n  - {name: lora}\n  - {", 1)
    assert "say which: method.0.rank" in refusal(load, text, "method.rank=3")
    assert [m.rank for m in load(text, "method.0.rank=3").method] == [3, 16]


def test_a_method_of_ones_own_is_named_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_toy_method.py").write_text(
        '''from __future__ import annotations
from dataclasses import dataclass
from byway import LoRA

@dataclass(frozen=True, kw_only=True)
class Toy(LoRA):
    """A toy."""
    r: float = 0.5
    """Has the name of an alias."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r > 1:
            raise ValueError("r is above 1")
''',
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe.from_dict(with_("method", name="my_toy_method:Toy", r=0.25, rank=3))
    toy: Any = recipe.method[0]
    assert (toy.r, toy.rank) == (0.25, 3) and method_name(type(toy)) == "my_toy_method:Toy"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ConfigError, match=r"method\.r is above 1"):
        Recipe.from_dict(with_("method", name="my_toy_method:Toy", r=2.0))
    with pytest.raises(ConfigError, match="has no Method named 'Toi'"):
        Recipe.from_dict(with_("method", name="my_toy_method:Toi"))


def test_a_key_of_another_section_is_named_with_its_section() -> None:
    for key, meant in (
        ("train.devices", "base.device"),
        ("base.learning_rat", "train.learning_rate"),
        ("engine.max_lenght", "data.max_length"),
    ):
        with pytest.raises(ConfigError) as caught:
            Recipe.from_dict(SMALL, [f"{key}=1"])
        assert f"did you mean {meant!r}?" in str(caught.value)


def test_adapters_are_named_after_their_methods() -> None:
    lora = byway.LoRA()
    assert adapter_names((lora,)) == ("default",)
    assert adapter_names((lora, lora, lora)) == ("lora", "lora-2", "lora-3")


def test_the_schema_describes_every_key_and_every_method() -> None:
    found = json.loads(json.dumps(schema()))
    assert set(found["properties"]) == {"base", "method", "data", "train", "engine", "output"}
    for name in ("base", "data", "train", "engine"):
        assert all(entry.get("description") for entry in found["properties"][name]["properties"].values()), name
    train = found["properties"]["train"]["properties"]
    assert train["learning_rate"]["exclusiveMinimum"] == 0 and train["seed"]["type"] == "integer" and train["epochs"]["default"] == 1.0
    assert found["properties"]["data"]["required"] == ["train"]
    methods = {entry["title"]: entry for entry in found["properties"]["method"]["anyOf"][0]["anyOf"]}
    assert set(byway.methods.names()) < set(methods)
    rank = {"type": "integer", "default": 8, "minimum": 1, "maximum": 65536, "description": "r: the rank of the update."}
    assert methods["lora"]["properties"]["rank"] == rank
    assert methods["dora"]["properties"]["dropout"]["exclusiveMaximum"] == 1
    assert methods["weight_chain"]["properties"]["links"]["minItems"] == 1
    task = found["properties"]["data"]["properties"]["task"]
    assert task["anyOf"] == [{"enum": ["chat", "classification", "text"]}, {"type": "string", "pattern": IMPORT_PATH}]
    assert methods["lora"]["additionalProperties"] is False


def test_formats_are_those_that_the_data_package_knows() -> None:
    from typing import get_args

    from byway.core.fields import hints
    from byway.data.encode import Overflow
    from byway.data.formats import FORMATS

    assert set(get_args(hints(Data)["format"])) == {"auto", *(entry.name for entry in FORMATS)}
    assert set(get_args(hints(Data)["overflow"])) == set(get_args(Overflow))


def test_reading_the_package_imports_no_torch() -> None:
    code = "import sys, byway.recipe; print([m for m in ('torch', 'transformers', 'datasets', 'typer', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
