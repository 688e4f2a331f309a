"""Every row of the table of architecture facts is checked against a model of that family: what runs, and in which
order."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from byway.core.families import Facts, attention_windows, detect, facts
from byway.core.families.facts import find
from byway.core.families.table import FAMILIES
from byway.core.slots import base_modules
from byway.core.targets.search import leaves
from byway.core.weights import is_linear
from byway.errors import TargetError
from tests import unlisted, zoo

torch.set_num_threads(1)
NAMES = list(zoo.MODELS)


@cache
def known(name: str) -> Facts:
    return facts(zoo.shared(name))


HEADED = [name for name in NAMES if known(name).head is not None]
FUSED = [name for name in NAMES if any("q" in fused.parts for fused in known(name).fused.values())]
# one residual stream of attention and feed-forward parts
PLAIN = [name for name in NAMES if known(name).kind == "decoder" and known(name).feed_forward_linears]


@contextmanager
def hooked(model: nn.Module, path: str, change: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handle = model.get_submodule(path).register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(**zoo.inputs(model))


def test_every_row_is_built_and_every_model_has_a_row() -> None:
    built = {zoo.config(name).model_type for name in NAMES}
    assert built == set(FAMILIES)
    assert len(built) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_layers_run_in_the_order_of_the_stacks(name: str) -> None:
    model, f = zoo.shared(name), known(name)
    ran: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
        for paths in f.stacks.values()
        for path in paths
    ]
    run(model)
    for handle in handles:
        handle.remove()
    for stack, paths in f.stacks.items():
        assert [path for path in dict.fromkeys(ran) if path in paths] == list(paths), stack
        assert paths[0].startswith(f"{f.stack_modules[stack]}." if f.stack_modules[stack] else "")
    assert sum(len(paths) for paths in f.stacks.values()) == {"swin": 4, "albert": 1}.get(name, 2 * len(f.stacks))


@pytest.mark.parametrize("name", NAMES)
def test_the_trunk_gives_the_last_hidden_state(name: str) -> None:
    model = zoo.shared(name)
    trunk = facts(model).trunk
    if trunk is None:
        assert name in ("t5", "mt5")
        return
    seen: list[Any] = []
    with hooked(model, trunk, lambda _m, _i, out: seen.append(out)):
        run(model)
    assert len(seen) == 1
    if name in ("clip", "siglip"):
        assert {"text_embeds", "image_embeds"} <= set(seen[0])
    else:
        assert seen[0][0].ndim == 3 or name == "clip_text_model"


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_map_in_a_layer_has_one_role(name: str) -> None:
    model, f = zoo.shared(name), known(name)
    inside = {path for path, module in base_modules(model) if is_linear(module) and f.layer_of(path) is not None}
    routers = {path for path in inside if path.endswith("shared_expert_gate")}
    attention, feed_forward = set(f.attention_linears), set(f.feed_forward_linears)
    assert attention | feed_forward == inside - routers
    assert not attention & feed_forward
    assert set(f.attention_outputs) <= attention
    assert set(f.feed_forward_outputs) <= feed_forward
    for path in f.attention_modules:
        assert any(a.startswith(f"{path}.") for a in attention)
    for path in (*f.attention_outputs, *f.feed_forward_outputs):
        # maps that write to the residual stream are not fused
        assert path.rpartition(".")[2] not in f.fused


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_no_pattern_of_a_row_is_dead(model_type: str) -> None:
    row = FAMILIES[model_type]
    these = [name for name in NAMES if known(name).model_type == model_type]
    for pattern in (*row.attention, *row.feed_forward, *row.attention_modules, *row.feed_forward_modules):
        expression = find(pattern)
        relative = (
            path.removeprefix(f"{layer}.")
            for name in these
            for path, _ in base_modules(zoo.shared(name))
            for layer in (layer for layers in known(name).stacks.values() for layer in layers)
            if path.startswith(f"{layer}.")
        )
        assert any(expression.fullmatch(path) for path in relative), pattern
    for stack in row.stacks:
        assert any(stack in known(n).stacks for n in these)


@pytest.mark.parametrize("name", NAMES)
def test_attention_reaches_the_registry_exactly_where_the_table_says(name: str) -> None:
    called: set[str] = set()
    model = zoo.build(name)
    paths = {id(module): path for path, module in base_modules(model)}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        called.add(paths[id(module)])
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("byway_probe", probe)
    AttentionMaskInterface.register("byway_probe", sdpa_mask)
    f = facts(model)
    try:
        model.set_attn_implementation("byway_probe")
    except ValueError as refused:
        assert not f.attention_registry, refused
        return
    run(model)
    assert called == (set(f.attention_modules) if f.attention_registry else set())


@pytest.mark.parametrize("name", HEADED)
def test_logits_are_the_heads_output_exactly_where_nothing_follows_it(name: str) -> None:
    model = zoo.build(name)
    f = known(name)
    for key, buffer in model.named_buffers():
        if key == "final_logits_bias":  # zero in a new model
            buffer.normal_()
    seen: list[Tensor] = []
    assert f.head is not None
    with hooked(model, f.head, lambda _m, _i, out: seen.append(out)):
        logits = run(model).logits
    assert torch.equal(seen[0], logits) is not f.after_head


@pytest.mark.parametrize("name", PLAIN)
def test_parallel_blocks_are_those_whose_feed_forward_does_not_see_the_attention(name: str) -> None:
    model, f = zoo.shared(name), known(name)
    first = next(path for path in f.feed_forward_linears if f.layer_of(path) == ("decoder", 0))
    output = next(path for path in f.attention_outputs if f.layer_of(path) == ("decoder", 0))
    seen: list[Tensor] = []
    with hooked(model, first, lambda _m, given, _o: seen.append(given[0].clone())):
        run(model)
        with hooked(model, output, lambda _m, _i, out: out + torch.linspace(-3, 3, out.shape[-1])):
            run(model)
    assert torch.equal(seen[0], seen[1]) is f.parallel_blocks


@pytest.mark.parametrize("name", FUSED)
def test_fused_maps_are_made_of_the_parts_the_table_says(name: str) -> None:
    model = zoo.build(name)
    f = known(name)
    leaf, fused = next((leaf, fused) for leaf, fused in f.fused.items() if "q" in fused.parts)
    path = next(p for p in f.attention_linears if p.endswith(f".{leaf}"))
    output = f.attention_outputs[0]
    covered = sorted(r for part in fused.parts for r in fused.ranges(part))
    assert [stop for _, stop in covered[:-1]] == [start for start, _ in covered[1:]]

    def without(*parts: str) -> Tensor:
        def silence(_m: nn.Module, _i: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for part in parts:
                for start, stop in fused.ranges(part):
                    out[..., start:stop] = 0
            assert covered[-1][1] == out.shape[-1]
            return out

        seen: list[Tensor] = []
        with hooked(model, path, silence), hooked(model, output, lambda _m, given, _o: seen.append(given[0])):
            run(model)
        return seen[0]

    whole = without()
    torch.testing.assert_close(without("v"), torch.zeros_like(whole), rtol=0, atol=0)
    assert not torch.allclose(without("q"), whole, atol=1e-4)
    if not name.startswith("deberta"):  # its relative positions also meet the queries
        torch.testing.assert_close(without("q"), without("k"), rtol=0, atol=1e-6)


def test_gate_and_up_are_the_halves_of_a_fused_feed_forward() -> None:
    for name in ("phi3", "glm", "modernbert"):
        model = zoo.shared(name)
        leaf, fused = next((leaf, f) for leaf, f in facts(model).fused.items() if "gate" in f.parts)
        path = next(p for p in facts(model).feed_forward_linears if p.endswith(f".{leaf}"))
        inner = model.get_submodule(path.rpartition(".")[0])
        weight = model.get_submodule(path).weight
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        (a, b), (c, d) = fused.ranges("gate")[0], fused.ranges("up")[0]
        activation = inner.act if name == "modernbert" else inner.activation_fn
        wanted = activation(x @ weight[a:b].T) * (x @ weight[c:d].T)
        seen: list[Tensor] = []
        with hooked(inner, facts(model).feed_forward_outputs[0].rpartition(".")[2], lambda _m, given, _o, seen=seen: seen.append(given[0])):
            inner(x)
        torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-7)


def test_attention_windows_are_read_from_the_configuration() -> None:
    windows = {name: attention_windows(zoo.shared(name)) for name in ("llama", "mistral", "modernbert", "gemma2")}
    assert windows == {"llama": (), "mistral": (4096,), "modernbert": (128,), "gemma2": (4096,)}


def test_default_targets_are_those_of_peft() -> None:
    spec = importlib.util.find_spec("peft")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "utils" / "constants.py").read_text()
    table = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    )
    common = set(table) & set(FAMILIES)
    assert len(common) >= 20
    for model_type in common:
        assert list(FAMILIES[model_type].targets) == table[model_type], model_type
    for name in NAMES:
        model = zoo.shared(name)
        for target in known(name).require("default_targets"):
            assert any(path.endswith(f".{target}") and is_linear(module) for path, module in base_modules(model))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_model_is_read_from_its_structure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = known(name)
    monkeypatch.setattr(detect, "FAMILIES", {})
    read = facts(zoo.shared(name))
    assert sorted(read.stacks.values()) == sorted(row.stacks.values())
    assert read.attention_linears == row.attention_linears
    assert read.feed_forward_linears == row.feed_forward_linears
    assert read.attention_modules == row.attention_modules
    assert read.attention_registry == row.attention_registry
    assert read.head == row.head
    # OPT calls the decoder inside its trunk directly, which only the table knows
    assert read.trunk == ("model" if name == "opt" else row.trunk)
    if read.default_targets:
        assert set(read.default_targets) <= set(row.default_targets)


@pytest.mark.parametrize(
    ("name", "model_class", "trunk", "kind", "heads"),
    [
        ("llama", "LlamaModel", "", "decoder", ()),
        ("llama", "LlamaForSequenceClassification", "model", "decoder", ("score",)),
        ("bert", "BertModel", "", "encoder", ()),
        ("bert", "BertForQuestionAnswering", "bert", "encoder", ("qa_outputs",)),
        ("distilbert", "DistilBertForSequenceClassification", "distilbert", "encoder", ("pre_classifier", "classifier")),
        ("deberta-v2", "DebertaV2ForSequenceClassification", "deberta", "encoder", ("pooler", "classifier")),
        ("deberta-v2", "DebertaV2ForMaskedLM", "deberta", "encoder", ()),
        ("t5", "T5EncoderModel", "", "encoder", ()),
        ("t5", "T5ForSequenceClassification", "transformer", "encoder-decoder", ("classification_head",)),
        ("bart", "BartForCausalLM", "model.decoder", "decoder", ()),
        ("opt", "OPTForSequenceClassification", "model.decoder", "decoder", ("score",)),
        ("whisper", "WhisperForAudioClassification", "encoder", "encoder", ("projector", "classifier")),
        ("deit", "DeiTForImageClassificationWithTeacher", "deit", "vision", ("cls_classifier", "distillation_classifier")),
        ("clip", "CLIPForImageClassification", "vision_model", "vision", ("classifier",)),
        ("siglip", "SiglipForImageClassification", "vision_model", "vision", ("classifier",)),
    ],
)
def test_other_classes_of_a_family(name: str, model_class: str, trunk: str, kind: str, heads: tuple[str, ...]) -> None:
    model = zoo.build(name, model_class)
    f = facts(model)
    assert (f.trunk, f.kind, f.task_heads) == (trunk, kind, heads)
    assert f.stacks
    calls: list[int] = []
    with hooked(model, trunk, lambda *_: calls.append(1)):
        run(model)
    assert len(calls) == 1


def test_a_wrapped_model_keeps_its_facts_under_the_wrappers_path() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = zoo.build("llama", "LlamaModel")
            self.classifier = nn.Linear(32, 2)

    f = facts(Wrapper())
    assert (f.trunk, f.kind, f.model_type) == ("net", "decoder", "llama")
    assert f.stacks == {"decoder": ("net.layers.0", "net.layers.1")}
    assert f.attention_linears[0] == "net.layers.0.self_attn.q_proj"
    assert f.task_heads == ("classifier",)


def test_a_model_made_of_two_known_ones_names_its_stacks_after_them() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=zoo.config("clip_vision_model"), text_config=zoo.config("llama"))
    f = facts(LlavaForConditionalGeneration(config))
    assert {name: len(paths) for name, paths in f.stacks.items()} == {"vision_tower": 2, "language_model": 2}
    assert (f.kind, f.trunk, f.head) == ("decoder", "model", "lm_head")
    with pytest.raises(TargetError, match="default targets of a 'llava' model"):
        f.require("default_targets")


def test_plain_torch_models_have_what_their_structure_shows() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    f = facts(nn.TransformerEncoder(layer, 3))
    assert f.stacks == {"layers": ("layers.0", "layers.1", "layers.2")}
    assert tuple(leaves(f.feed_forward_linears)) == ("linear1", "linear2")
    assert not f.attention_linears  # its weights are read directly, so side paths would not run
    mlp = facts(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert (mlp.kind, mlp.model_type, mlp.stacks) == ("unknown", "", {})
    for fact in ("trunk", "stacks", "attention_modules", "default_targets", "head"):
        with pytest.raises(TargetError, match="cannot be told from its structure") as error:
            mlp.require(fact)
        assert error.value.hint


def test_a_neutral_scale_after_the_head_is_none_at_all() -> None:
    assert facts(zoo.shared("granite")).after_head
    assert not facts(zoo.shared("granite unscaled")).after_head
    assert not facts(zoo.shared("gemma3_text")).after_head  # no cap is set


@pytest.mark.parametrize("name", NAMES)
def test_the_structure_tells_the_ends_of_feed_forward_parts_as_the_table_does(name: str) -> None:
    found = detect._from_structure(dict(base_modules(zoo.shared(name))))
    assert set(found.feed_forward_outputs) == set(known(name).feed_forward_outputs)


@pytest.mark.parametrize(
    ("name", "ends"),
    {
        "gemma4_text": {"mlp.down_proj"},
        "gemma3n_text": {"mlp.down_proj"},  # not the maps of each layer's own inputs, which have the same shape
        "qwen2_5_vl": {"mlp.down_proj"},
        "modernbert-decoder": {"mlp.Wo"},
        "falcon_h1": {"feed_forward.down_proj"},
        "deepseek_v2": {"mlp.down_proj", "mlp.shared_experts.down_proj"},
        "lfm2": {"feed_forward.w2"},
        "phimoe": set(),
        "pixtral": {"feed_forward.down_proj"},  # its layers are named after their attention
        "biogpt": {"fc2"},
        "ernie": {"output.dense"},
    }.items(),
)
def test_the_ends_of_feed_forward_parts_in_families_outside_the_table(name: str, ends: set[str]) -> None:
    found = facts(unlisted.build(name))
    layers = [layer for stack in found.stacks.values() for layer in stack]
    assert found.model_type not in FAMILIES and len(layers) >= 2 and found.attention_linears
    expected = {f"{layer}.{end}" for layer in layers for end in ends}
    assert set(found.feed_forward_outputs) == expected & set(found.feed_forward_linears)
    assert all(set(found.feed_forward_outputs) & {f"{layer}.{end}" for end in ends} for layer in layers) or not ends
