"""What is written as targets selects exactly that, or is an error that says what is there."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch import nn

import byway
from byway.core.reads import uses
from byway.core.slots import Site
from byway.core.targets.resolve import modules_to_save, pattern_value, resolve
from byway.core.targets.search import ALL_LINEAR
from byway.core.weights import is_linear
from byway.errors import TargetError
from tests import unlisted, zoo

torch.set_num_threads(1)


def paths(name: str, targets: Any, **options: Any) -> list[str]:
    sites = resolve(zoo.shared(name), targets, **options)
    assert all(isinstance(site, Site) and zoo.shared(name).get_submodule(site.path) is site.module for site in sites)
    return [site.path for site in sites]


def refused(name: str, targets: Any, **options: Any) -> TargetError:
    with pytest.raises(TargetError) as error:
        resolve(zoo.shared(name), targets, **options)
    return error.value


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def layer(index: int, *leaves: str) -> list[str]:
    return [f"model.layers.{index}.{'mlp' if leaf in MLP else 'self_attn'}.{leaf}" for leaf in leaves]


def test_a_name_is_a_path_or_its_end_from_a_dot_on() -> None:
    assert paths("llama", ["v_proj", "q_proj"]) == [*layer(0, "q_proj", "v_proj"), *layer(1, "q_proj", "v_proj")]
    assert paths("llama", ["self_attn.q_proj"]) == [*layer(0, "q_proj"), *layer(1, "q_proj")]
    assert paths("llama", layer(1, "o_proj")) == layer(1, "o_proj")
    assert paths("bert", ["output.dense"]) == [
        f"bert.encoder.layer.{i}.{where}output.dense" for i in range(2) for where in ("attention.", "")
    ]


def test_a_string_is_a_regular_expression_for_whole_paths() -> None:
    assert paths("llama", r".*\.1\..*_proj") == [*layer(1, *ATTENTION), *layer(1, *MLP)]
    error = refused("llama", "q_proj")
    assert "matches no module" in error.message
    assert error.hint == "to name modules, write a list: ['q_proj']"


def test_roles_are_all_linear_maps_of_a_part() -> None:
    assert paths("llama", "attention") == paths("llama", ["attention"]) == [*layer(0, *ATTENTION), *layer(1, *ATTENTION)]
    assert paths("llama", ["feed-forward", "q_proj"]) == [*layer(0, "q_proj", *MLP), *layer(1, "q_proj", *MLP)]
    assert paths("gpt2", "attention") == [f"transformer.h.{i}.attn.{leaf}" for i in range(2) for leaf in ("c_attn", "c_proj")]
    assert len(paths("t5", "attention")) == 2 * 4 + 2 * 8


def test_none_is_the_usual_choice_for_the_architecture_or_the_methods_own() -> None:
    assert paths("llama", None) == [*layer(0, "q_proj", "v_proj"), *layer(1, "q_proj", "v_proj")]
    assert paths("gpt2", None) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert paths("llama", None, default=["down_proj"]) == [*layer(0, "down_proj"), *layer(1, "down_proj")]
    with pytest.raises(TargetError, match="default targets of this model") as error:
        resolve(nn.Sequential(nn.Linear(2, 2)), None)
    assert "all-linear" in error.value.hint


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "vit", "xlm-roberta", "falcon"])
def test_all_linear_is_every_linear_map_but_the_head(name: str) -> None:
    notes: list[str] = []
    found = paths(name, ALL_LINEAR, notes=notes)
    linear = [p for p, m in zoo.shared(name).named_modules() if is_linear(m)]
    left_out = set(linear) - set(found)
    heads = ("lm_head", "cls.predictions.decoder", "classifier")
    assert left_out
    assert all(path.startswith(heads) for path in left_out)
    assert any("leaves out the output head" in note and next(iter(left_out)) in note for note in notes)


def test_all_linear_says_that_experts_are_not_linear_maps() -> None:
    notes: list[str] = []
    found = paths("mixtral", ALL_LINEAR, notes=notes)
    assert found == [*layer(0, *ATTENTION), *layer(1, *ATTENTION)]
    assert any("experts of 2 layers" in note and "3-D" in note and "MixtralExperts" in note for note in notes)
    assert "3-D parameters" in refused("mixtral", "feed-forward").message
    both = paths("mixtral", ALL_LINEAR, accepts=lambda m: is_linear(m) or type(m).__name__ == "MixtralExperts")
    assert "model.layers.0.mlp.experts" in both


def test_what_torch_attention_reads_directly_is_never_a_silent_target() -> None:
    dead = "vision_model.head.attention.out_proj"
    notes: list[str] = []
    assert dead not in paths("siglip", ALL_LINEAR, notes=notes)
    assert any(dead in note for note in notes)
    assert len(paths("siglip", ["out_proj"], notes=notes)) == 4
    assert "reads the weight" in refused("siglip", [dead]).message
    assert "reads the weight" in refused("siglip", re.escape(dead)).message


def test_a_typo_beside_a_good_name_is_named_with_the_nearest_and_what_there_is() -> None:
    error = refused("llama", ["q_prj", "v_proj"])
    assert error.message == (
        "target 'q_prj' matches no module; did you mean 'q_proj'? "
        "(there are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)"
    )
    assert "did you mean 'attention'" in refused("llama", "attentoin").message
    assert "(there are: " in refused("llama", ["nothing_like_it"]).message


def test_the_names_that_there_are_end_at_twenty() -> None:
    many = nn.ModuleDict({f"part_{i:02}": nn.Linear(2, 2) for i in range(30)})
    with pytest.raises(TargetError, match=r"part_19, … 10 more\)"):
        resolve(many, ["zzz"])


def test_all_problems_come_at_once() -> None:
    error = refused("llama", ["q_prj", "k_prj", "input_layernorm"], exclude=["lm_heed"])
    assert error.message.startswith("4 problems:")
    for wrong in ("'q_prj'", "'k_prj'", "'input_layernorm'", "'lm_heed'"):
        assert wrong in error.message


@pytest.mark.parametrize(
    ("targets", "path", "kind"),
    [
        (["input_layernorm"], "model.layers.0.input_layernorm", "LlamaRMSNorm"),
        (["mlp"], "model.layers.0.mlp", "LlamaMLP"),
        (r".*act_fn", "model.layers.0.mlp.act_fn", "SiLU"),
        (["embed_tokens"], "model.embed_tokens", "Embedding"),
        (["q_proj", "norm"], "model.norm", "LlamaRMSNorm"),
    ],
)
def test_a_target_that_the_method_cannot_act_on_is_named_with_its_type(targets: Any, path: str, kind: str) -> None:
    message = refused("llama", targets).message
    assert repr(path) in message
    assert kind in message


def test_the_reason_is_given_also_where_other_matches_are_good() -> None:
    assert "'model.norm' (LlamaRMSNorm): this method does not support it" in refused("llama", r".*q_proj|model\.norm").message


def test_a_container_tells_what_is_inside() -> None:
    assert "it contains: down_proj, gate_proj, up_proj" in refused("llama", ["mlp"]).message


def test_other_methods_accept_other_modules() -> None:
    norms = paths("llama", ["input_layernorm"], accepts=lambda module: "RMSNorm" in type(module).__name__)
    assert norms == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    assert paths("llama", ["embed_tokens"], accepts=lambda module: isinstance(module, nn.Embedding)) == ["model.embed_tokens"]


def test_exclude_wins_and_takes_what_is_inside_a_named_container() -> None:
    assert paths("llama", ALL_LINEAR, exclude=["mlp"]) == paths("llama", "attention")
    assert paths("llama", ALL_LINEAR, exclude="feed-forward") == paths("llama", "attention")
    assert paths("llama", ["q_proj"], exclude=r".*\.0\..*") == layer(1, "q_proj")
    assert paths("llama", ALL_LINEAR, exclude=["lm_head"]) == paths("llama", ALL_LINEAR)
    assert "exclude 'lm_heed' matches no module; did you mean 'lm_head'?" in refused("llama", ALL_LINEAR, exclude=["lm_heed"]).message
    assert "exclude removes all its matches" in refused("llama", ["q_proj", "k_proj"], exclude=["q_proj"]).message


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (0, [0]),
        ([1], [1]),
        ([0, 1], [0, 1]),
        ([-1], [1]),
        ("1-", [1]),
        ("0-", [0, 1]),
        ("0-1", [0, 1]),
        ("0,1", [0, 1]),
        (["decoder:1"], [1]),
    ],
)
def test_layers_are_indices_or_ranges(layers: Any, chosen: list[int]) -> None:
    assert paths("llama", ["q_proj"], layers=layers) == [p for i in chosen for p in layer(i, "q_proj")]


def test_layers_are_counted_in_each_stack() -> None:
    first = paths("t5", ["q"], layers=[0])
    assert first == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]
    assert paths("t5", ["q"], layers="encoder:0") == first[:1]
    assert paths("t5", ["q"], layers=["encoder:1", "decoder:0"])[0] == "encoder.block.1.layer.0.SelfAttention.q"
    assert len(paths("swin", ["q_proj"], layers="2-")) == 2  # four layers in two stages


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([5], "layers 5 is out of range: decoder has 2 layers (0-1)"),
        ([-3], "layers -3 is out of range"),
        ("2-", "layers '2-' is out of range"),
        ("0-2", "layers '0-2' is out of range"),
        ("1-0", "layers '1-0' is empty"),
        ("-4", "[-4, -3, -2, -1] the last four"),
        ("x", "not an index or a range"),
        ([True], "an index or a range"),
        ([1.0], "an index or a range"),
        ([], "layers is empty"),
        ("decodr:0", "there is no stack 'decodr'; did you mean 'decoder'?"),
    ],
)
def test_layers_that_are_not_there_are_errors(layers: Any, said: str) -> None:
    assert said in refused("llama", ["q_proj"], layers=layers).message


def test_a_target_without_a_match_in_the_chosen_layers_is_an_error() -> None:
    message = refused("t5", ["q", "EncDecAttention.q"], layers="encoder:0").message
    assert "target 'EncDecAttention.q' matches nothing in layers 'encoder:0'" in message
    with pytest.raises(TargetError, match="no stack of layers"):
        resolve(nn.Sequential(nn.Linear(2, 2)), ["0"], layers=[0])


def test_what_a_list_cannot_hold_is_explained() -> None:
    assert refused("llama", [ALL_LINEAR]).hint == "write 'all-linear' as a plain string, not in a list"
    assert "plain string" in refused("llama", [".*q_proj"]).hint
    assert "list is empty" in refused("llama", []).message


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("(.*", "not a valid regular expression"),
        ("a" * 501, "501 characters; the limit is 500"),
        ("(((a{1000}){1000}){1000}).*", "unroll into more than"),
        ("(?:a|aa|\\w|\\w\\w|.)+[^\\w.]", "takes longer than"),
        ("(?:q_proj){e}", "a brace that is not a repeat"),
    ],
)
@pytest.mark.parametrize("where", ["targets", "exclude", "rank_pattern"])
def test_an_invalid_or_catastrophic_expression_ends_soon_with_a_clear_message(expression: str, said: str, where: str) -> None:
    begun = time.process_time()
    options: dict[str, dict[str, Any]] = {
        "targets": {"targets": expression},
        "exclude": {"targets": ["q_proj"], "exclude": expression},
        "rank_pattern": {"targets": ["q_proj"], "patterns": {"rank_pattern": {expression: 4}}},
    }
    assert said in refused("llama", **options[where]).message
    assert time.process_time() - begun < 2


def test_patterns_match_the_end_of_a_path_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    pattern = {"layers.0.self_attn.q_proj": 2, "q_proj": 4, r"layers\.\d+\.mlp\..*": 8, "proj": 16}
    for site in resolve(zoo.shared("llama"), ALL_LINEAR):
        key = get_pattern_key(pattern.keys(), site.path)
        assert pattern_value(site.path, pattern, 1) == pattern.get(key, 1)


def test_every_pattern_key_must_match_a_target() -> None:
    found = paths("llama", ["q_proj"], patterns={"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2}})
    message = refused("llama", ["q_proj"], patterns={"rank_pattern": {"q_prj": 4}, "alpha_pattern": {"v_proj": 8}}).message
    assert "rank_pattern key 'q_prj' matches no target; did you mean 'q_proj'?" in message
    assert "alpha_pattern key 'v_proj' matches no target" in message
    assert found == [*layer(0, "q_proj"), *layer(1, "q_proj")]


def test_modules_to_save_are_task_heads_or_names() -> None:
    model = zoo.shared("distilbert")
    assert [s.path for s in modules_to_save(model, "auto")] == ["pre_classifier", "classifier"]
    assert modules_to_save(model, "none") == []
    assert modules_to_save(zoo.shared("llama"), "auto") == []
    assert [s.path for s in modules_to_save(zoo.shared("llama"), ["lm_head", "model.embed_tokens"])] == ["model.embed_tokens", "lm_head"]
    both = modules_to_save(zoo.shared("xlm-roberta"), ["classifier", "classifier.out_proj"])
    assert [s.path for s in both] == ["classifier"]  # what lies inside is trained with it


def test_an_unknown_module_to_save_is_an_error() -> None:
    with pytest.raises(TargetError, match="module to save 'clasifier' matches no module; did you mean 'classifier'"):
        modules_to_save(zoo.shared("distilbert"), ["clasifier", "pre_classifier"])
    with pytest.raises(TargetError, match=r"'dropout' .*no parameters to train"):
        modules_to_save(zoo.shared("distilbert"), ["dropout"])


def test_what_hangs_on_a_model_is_not_a_target() -> None:
    from byway.core.slots import SLOT, Slot

    model = zoo.build("llama")
    site = model.model.layers[0].self_attn.q_proj
    before = [s.path for s in resolve(model, ALL_LINEAR)]
    slot = Slot(site)
    slot.add_module("default", nn.Linear(2, 2))
    site.add_module(SLOT, slot)
    assert any(f".{SLOT}." in path for path, module in model.named_modules() if is_linear(module))
    assert [s.path for s in resolve(model, ALL_LINEAR)] == before


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("mamba", {"dt_proj"}),  # read in every branch: its source code tells
        ("falcon_mamba", {"dt_proj"}),  # called in one branch and read in another: two tokens tell
        ("jamba", {"dt_proj"}),
        ("mobilebert", {"predictions.dense"}),  # its transpose is read
        ("falcon_h1", set()),
    ],
)
def test_all_linear_leaves_out_maps_that_are_read_and_not_called(name: str, read: set[str]) -> None:
    model = unlisted.build(name)
    modes = {path: module.training for path, module in model.named_modules()}
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear"))
    assert all(model.get_submodule(path).training == mode for path, mode in modes.items())
    note = next((note for note in adapter.notes if "reads directly" in note), "")
    assert all(leaf in note for leaf in read) and bool(note) == bool(read)
    sites = {path.rpartition(".byway")[0] for path, _ in adapter.named_parameters()}
    assert not any(path.endswith(leaf) for path in sites for leaf in read)
    model(input_ids=torch.randint(3, 90, (2, 5)))[0].sum().backward()  # no dead site is found
    assert all(p.grad is not None for n, p in adapter.named_parameters() if "dense" in n or ".layers.0." in n)
    for leaf in read:
        with pytest.raises(TargetError, match=rf"reads the weight of '.*{leaf}' directly and would bypass an adapter"):
            resolve(unlisted.build(name), [leaf])


class Branching(nn.Module):
    """Calls one of two maps; the other is no dead site."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, rare: bool = False) -> torch.Tensor:
        return self.rare(x) if rare else self.usual(x)


def test_a_map_that_is_called_in_another_branch_only_is_no_dead_site() -> None:
    model = nn.Sequential(Branching())
    byway.attach(model, byway.LoRA(rank=2, targets=["usual", "rare"]))
    model(torch.ones(1, 4))
    assert uses(model[0], "rare") == {"called"}
