"""Below the frontier there are no saved activations, gradients or dropout; above it training is as usual."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.families import facts
from byway.core.method import Method
from byway.core.slots import base_modules
from byway.engine.backward.frontier import Cut, frontier, frontier_layers, modules_below
from tests import tiny, zoo

L = tiny.LAYERS

CASES: dict[str, tuple[str, Callable[[], Method], dict[str, int]]] = {
    "lora, upper layers": ("llama", lambda: byway.LoRA(rank=2, layers="2-"), {"decoder": 2}),
    "lora, all layers": ("llama", lambda: byway.LoRA(rank=2), {"decoder": 0}),
    "lora on the output head": ("llama", lambda: byway.LoRA(rank=2, targets=["lm_head"]), {"decoder": L}),
    "lora on the embedding": ("llama", lambda: byway.LoRA(rank=2, targets=["embed_tokens"]), {}),
    "prompt": ("llama", lambda: byway.PromptTuning(num_virtual_tokens=2), {}),
    "prefix in every attention": ("gpt2", lambda: byway.PTuningV2(num_virtual_tokens=2), {"decoder": 0}),
    "ladder": ("llama", lambda: byway.LadderSideTuning(reduction=4), {"decoder": L}),
    "ladder on an encoder": ("bert", lambda: byway.LadderSideTuning(reduction=4), {"encoder": L}),
    "ladder on both": ("t5", lambda: byway.LadderSideTuning(reduction=4), {"encoder": L, "decoder": L}),
    "the last layers' norms": ("llama", lambda: byway.LayerNormTuning(layers="1-"), {"decoder": 1}),
    "all norms": ("llama", byway.LayerNormTuning, {"decoder": 0}),
    "norms of the embedding too": ("bert", byway.LayerNormTuning, {}),
    "the final norm": ("llama", lambda: byway.LayerNormTuning(targets=["model.norm"]), {"decoder": L}),
    "a classifier, whole": ("bert", lambda: byway.Full(targets=["classifier"]), {"encoder": L}),
    "a classifier's bias": ("bert", lambda: byway.BitFit(exclude=r"bert\..*"), {"encoder": L}),
    "pooler and classifier": ("bert", lambda: byway.Full(targets=["bert.pooler.dense", "classifier"]), {"encoder": L}),
    "a vision tower's upper layers": ("vit", lambda: byway.LoRA(rank=2, layers="2-"), {"encoder": 2}),
    "a vision tower's classifier": ("vit", lambda: byway.Full(targets=["classifier"]), {"encoder": L}),
    "decoder only": ("t5", lambda: byway.LoRA(rank=2, targets=r"decoder\..*\.q"), {"encoder": L, "decoder": 0}),
    "upper decoder only": ("t5", lambda: byway.LoRA(rank=2, targets=r"decoder\..*\.[qv]", layers="1-"), {"encoder": L, "decoder": 1}),
    # gradients reach the encoder through the decoder's attention in every layer
    "encoder only": ("t5", lambda: byway.LoRA(rank=2, targets=r"encoder\..*\.q", layers="2-"), {"encoder": 2, "decoder": 0}),
    "upper layers of both": ("t5", lambda: byway.LoRA(rank=2, layers="2-"), {"encoder": 2, "decoder": 0}),
    "prefix in the decoder": ("t5", lambda: byway.PTuningV2(num_virtual_tokens=2, attentions="decoder"), {"encoder": L, "decoder": 0}),
    "prefix in the encoder": ("t5", lambda: byway.PTuningV2(num_virtual_tokens=2, attentions="encoder"), {"encoder": 0, "decoder": 0}),
    "the encoder's norm": ("t5", lambda: byway.LayerNormTuning(targets=["encoder.final_layer_norm"]), {"encoder": L, "decoder": 0}),
}


def attached(case: str) -> tuple[Any, byway.Adapter, dict[str, Any]]:
    """A tiny model in training mode, its randomized adapter, and inputs."""
    family, method, _ = CASES[case]
    model, x = tiny.build(family), tiny.inputs(family)
    adapter = byway.attach(model, method())
    tiny.randomize(adapter.named_parameters())
    return model.train(), adapter, x


class Kept:
    """A saved tensor, for as long as the graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output saved by its own graph would keep the graph alive


def kept(model: nn.Module, x: dict[str, Any]) -> tuple[Counter[str], Any]:
    """The number of tensors that the graph keeps, by the layer that saved them (``""``: outside of layers), and the
    logits."""
    layers = [path for stack in facts(model).stacks.values() for path in stack]
    here, saved = [""], list[tuple[str, weakref.ref[Kept]]]()
    handles = []
    for path in layers:
        layer = model.get_submodule(path)
        handles.append(layer.register_forward_pre_hook(lambda module, args, path=path: here.append(str(path))))
        handles.append(layer.register_forward_hook(lambda module, args, out: here.pop() and None))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in own:
            return tensor
        one = Kept(tensor)
        saved.append((here[-1], weakref.ref(one)))
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor if isinstance(one, Kept) else one):
        logits = model(**x).logits
    for handle in handles:
        handle.remove()
    return Counter(path for path, one in saved if one() is not None), logits


def gradients(model: nn.Module, adapter: byway.Adapter, x: dict[str, Any], seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    names = dict(adapter.named_parameters())
    loss = model(**x).logits.float().pow(2).mean()
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(names.items(), found, strict=True)}


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("p", "dropout", "attention_dropout", "dropout_prob") and isinstance(value, float):
                vars(module)[name] = 0.0


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_kept_below_the_frontier_even_if_the_embedding_requires_a_gradient(case: str) -> None:
    model, _, x = attached(case)
    assert {cut.stack: cut.index for cut in frontier_layers(model)} == CASES[case][2]
    if CASES[case][0] != "vit":
        model.enable_input_require_grads()  # as transformers' switch for checkpointing does
    with frontier(model) as cuts:
        found, logits = kept(model, x)
        for cut in cuts:
            assert [path for path in cut.below if found[path]] == []
            assert all(found[path] for path in cut.above)
        assert logits.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_the_frontier_changes_no_gradient_bit_for_bit(case: str) -> None:
    model, adapter, x = attached(case)
    without_dropout(model)
    expected = gradients(model, adapter, x)
    assert any(bool(g.any()) for g in expected.values())
    with frontier(model):
        found = gradients(model, adapter, x)
    assert all(torch.equal(found[name], g) for name, g in expected.items())


def test_a_layer_that_runs_many_times_is_entered_without_a_graph_once() -> None:
    """ALBERT runs one layer many times: its later inputs depend on its own trainable parameters."""
    model, x = zoo.build("albert"), zoo.inputs(zoo.shared("albert"))
    adapter = byway.attach(model, byway.LoRA(rank=2, targets=["query"]))
    tiny.randomize(adapter.named_parameters())
    without_dropout(model.train())
    expected = gradients(model, adapter, x)
    with frontier(model) as cuts:
        assert [cut.index for cut in cuts] == [0]
        for _ in range(2):
            found = gradients(model, adapter, x)
            assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("bart", {"targets": ["model.decoder.layernorm_embedding"]}, {"encoder": 2}),
        ("bart", {"targets": ["model.encoder.layernorm_embedding"]}, {"decoder": 0}),
        ("mbart", {"targets": ["model.encoder.layer_norm"]}, {"encoder": 2, "decoder": 0}),
        ("mpnet", {"targets": ["mpnet.encoder.relative_attention_bias"]}, {}),
        ("swin", {"targets": ["swin.layernorm"]}, {"encoder": 4}),
        ("swin", {"targets": ["swin.encoder.layers.0.downsample"]}, {}),
        ("phi", {"targets": ["model.final_layernorm"]}, {"decoder": 2}),
        ("clip", {"targets": r"text_model\.encoder\.layers\.1\.mlp\.fc1"}, {"text": 1}),
        ("clip", {"targets": r"vision_model\.encoder\.layers\.1\.mlp\.fc1"}, {"text": 2, "vision": 1}),
    ],
)
def test_what_lies_beside_the_layers_counts_by_what_reads_it(name: str, options: dict[str, Any], expected: dict[str, int]) -> None:
    """Parts that are registered after the layers but feed them (BART's embedding norm, relative positions) are
    below."""
    model = zoo.build(name)
    byway.attach(model, byway.Full(**options))
    assert {cut.stack: cut.index for cut in frontier_layers(model)} == expected


DIFFERENT = ("phi", "opt", "mpt", "falcon", "gpt_oss", "deberta-v2", "mpnet", "distilbert", "wav2vec2", "bart", "whisper", "beit", "clip")


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_family_with_adapters_in_its_last_layers_gives_the_same_gradients(name: str) -> None:
    model, x = zoo.build(name), zoo.inputs(zoo.shared(name))
    last = {stack: layers[-1] for stack, layers in facts(model).stacks.items()}
    adapter = byway.attach(model, byway.LoRA(rank=2, targets="all-linear", layers=1, modules_to_save="none"))
    tiny.randomize(adapter.named_parameters())
    x = x | ({"use_cache": False} if facts(model).kind in ("decoder", "encoder-decoder") else {})
    names = dict(adapter.named_parameters())

    def measured() -> list[Tensor | None]:
        torch.manual_seed(0)
        out = model(**x)
        first = next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad)
        return list(torch.autograd.grad(first.float().pow(2).sum(), list(names.values()), allow_unused=True))

    expected = measured()
    with frontier(model) as cuts:
        assert cuts
        assert all(cut.first in (last[cut.stack], cut.layers[0]) for cut in cuts)
        found = measured()
    assert any(g is not None and bool(g.any()) for g in expected)
    for one, other in zip(expected, found, strict=True):
        assert (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))


# ---------------------------------------------------------------- evaluation mode


def dropouts(model: nn.Module) -> tuple[set[str], set[str]]:
    """(paths of the base's active dropout modules, paths of the inactive ones)."""
    found = [(path, module) for path, module in base_modules(model) if isinstance(module, nn.Dropout)]
    return {path for path, module in found if module.training}, {path for path, module in found if not module.training}


def test_dropout_is_inactive_below_the_frontier_and_active_above() -> None:
    model: Any = tiny.build("bert")
    adapter = byway.attach(model, byway.LoRA(rank=2, layers="2-", dropout=0.5))
    model.train()
    with frontier(model):
        acting, still = dropouts(model)
        assert still == {p for p in acting | still if p.startswith(("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"))}
        assert {"bert.encoder.layer.2.output.dropout", "dropout"} <= acting
        assert all(side.training for _, side in adapter.side_paths())
        hidden: list[Tensor] = []
        handle = model.get_submodule("bert.encoder.layer.1").register_forward_hook(lambda m, a, out: hidden.append(cast(Any, out)))
        logits = [model(**tiny.inputs("bert")).logits for _ in range(2)]
        assert torch.equal(*hidden)
        assert not torch.equal(*logits)
        handle.remove()
    assert all(module.training for module in model.modules())


def test_somebody_elses_train_call_does_not_wake_what_is_below() -> None:
    model: Any = tiny.build("gpt2")
    byway.attach(model, byway.LoRA(rank=2, layers="1-"))
    with frontier(model):
        model.train()
        model(**tiny.inputs("gpt2"))
        assert [layer.attn.resid_dropout.training for layer in model.transformer.h] == [False, True, True]
        assert not model.transformer.drop.training
    assert all(module.training for module in model.modules())
    model.train()
    with frontier(model):
        model.eval()
    assert not any(module.training for module in model.modules())


def test_dropout_that_a_stack_does_itself_rests_with_it() -> None:
    """BART's encoder and decoder apply dropout in their own forward, by their own flags."""
    model = zoo.build("bart")
    byway.attach(model, byway.LoRA(rank=2, targets=r"model\.decoder\..*q_proj", layers="1-"))
    model.train()
    with frontier(model):
        assert not any(module.training for module in model.model.encoder.modules() if not isinstance(module, nn.ModuleList))
        assert not model.model.decoder.training
        assert [layer.training for layer in model.model.decoder.layers] == [False, True]
        assert model.training and model.lm_head.training


def test_with_adapters_in_every_layer_no_mode_is_changed() -> None:
    """Only the embeddings are frozen, and their dropout acts as in any training."""
    model: Any = tiny.build("bert")
    byway.attach(model, byway.LoRA(rank=2))
    with frontier(model.train()) as cuts:
        assert modules_below(model, cuts) == []
        assert all(module.training for module in model.modules())


def test_a_ladder_keeps_its_own_modes() -> None:
    model: Any = tiny.build("t5")
    adapter = byway.attach(model, byway.LadderSideTuning(reduction=4))
    model.train()
    before = [module.training for module in model.modules()]
    with frontier(model):
        assert all(side.training for _, side in adapter.side_paths() if side.needs_gradient())
    assert [module.training for module in model.modules()] == before


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model: Any = tiny.build("llama")
    byway.attach(model, byway.LoRA(rank=2, layers="1-"))
    model.train()

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    with pytest.raises(ValueError, match="mine"), frontier(model):
        raise ValueError("mine")
    assert hooks() == before
    assert all(module.training for module in model.modules())


def test_a_cut_names_its_layers() -> None:
    cut = Cut("decoder", ("a", "b", "c"), 2)
    assert (cut.first, cut.below, cut.above) == ("c", ("a", "b"), ("c",))
    assert Cut("decoder", ("a",), 1).first is None
