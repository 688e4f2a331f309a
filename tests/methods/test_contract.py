"""Laws that every method obeys on every model family it can be attached to, with one tolerance for all methods."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import byway
from byway import methods
from byway.core.adapter import Adapter
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.frontier import frontier
from byway.errors import BywayError, ConfigError, NotMergeable
from tests.methods.cases import (
    ANOTHER_KERNEL,
    DECODER_PAIRS,
    PAIRS,
    REFUSED,
    SCALES,
    UNMERGEABLE,
    WITH_LAYERS,
    has_an_effect,
    method_of,
)
from tests.tiny import VOCABULARY, build, inputs, randomize

MERGE_RELATIVE = 1e-5  # fp32, reliability I3
PADDING_MAXIMUM = 1e-5  # fp32, reliability I10


on_every_pair = pytest.mark.parametrize(("name", "family"), PAIRS)
on_decoders = pytest.mark.parametrize(("name", "family"), DECODER_PAIRS)
on_mergeable = pytest.mark.parametrize(
    ("name", "family"), [pair for pair in PAIRS if methods.load(pair[0]).mergeable and pair not in UNMERGEABLE]
)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules())


def forwards(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if "forward" in vars(m)]


def digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for key, value in byway.base_state_dict(model).items():
        total.update(key.encode())
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def logits(model: nn.Module, x: dict[str, Any]) -> torch.Tensor:
    return model(**x).logits


def same(name: str, family: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5) if (name, family) in ANOTHER_KERNEL else torch.equal(a, b)


def active(model: nn.Module, name: str, adapter_name: str = "default") -> Adapter:
    adapter = byway.attach(model, method_of(name), name=adapter_name)
    randomize(adapter.named_parameters(), scale=SCALES.get(name, 0.1))
    return adapter


def gradients(model: nn.Module, adapter: Adapter, x: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits(model, x).float().pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}


@on_every_pair
def test_output_at_attach_equals_the_frozen_base_where_the_method_says_so(name: str, family: str) -> None:
    model, x = build(family).requires_grad_(False), inputs(family)
    frozen = logits(model, x)
    byway.attach(model, method_of(name))
    assert same(name, family, logits(model, x), frozen) == method_of(name).identity_at_start


@on_every_pair
def test_only_what_the_method_declares_is_trained_and_each_of_it_gets_a_gradient(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = active(model, name)
    declared = dict(adapter.named_parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(declared)
    assert adapter.num_parameters == sum(p.numel() for p in declared.values())
    logits(model, x).float().pow(2).mean().backward()
    assert [n for n, p in declared.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert [n for n, p in model.named_parameters() if p.grad is not None and n not in declared] == []


@on_every_pair
def test_frozen_tensors_are_bit_identical_after_training(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = active(model, name)
    before, start = digest(model), {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD([p for _, p in adapter.named_parameters()], lr=0.5)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        logits(model, x).float().pow(2).mean().backward()
        optimizer.step()
    assert digest(model) == before
    assert all(not torch.equal(p, start[n]) for n, p in adapter.named_parameters() if has_an_effect(n))


@on_every_pair
def test_detach_restores_everything_bit_for_bit(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    next(model.parameters()).requires_grad_(False)  # set by the user, so detach must restore it too
    was = (
        logits(model, x).detach(),
        list(model.state_dict()),
        [type(m) for m in model.modules()],
        hooks(model),
        forwards(model),
        [p.requires_grad for p in model.parameters()],
        model.config._attn_implementation,
    )
    active(model, name, "first")
    if not any(side.overrides("instead") for _, _, side in byway.side_paths(model)):  # only one replacement of a module can be active
        active(model, name, "second")
        byway.detach(model, "second")
    logits(model, x)
    byway.detach(model, "first")
    now = (
        logits(model, x).detach(),
        list(model.state_dict()),
        [type(m) for m in model.modules()],
        hooks(model),
        forwards(model),
        [p.requires_grad for p in model.parameters()],
        model.config._attn_implementation,
    )
    assert torch.equal(now[0], was[0])
    assert now[1:] == was[1:]


@on_every_pair
def test_a_base_state_dict_loads_strictly_and_a_partial_adapter_is_refused(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = active(model, name)
    out = logits(model, x)
    assert list(byway.base_state_dict(model)) == list(bare)
    model.load_state_dict(bare, strict=True)
    assert torch.equal(logits(model, x), out)
    if len(adapter.state_dict()) == 1:
        return  # without its only tensor it is a base state dict
    partial = model.state_dict()
    del partial[next(k for k in partial if ".byway." in f".{k}")]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(partial)


@pytest.mark.covering_sample(("name", "adapter_name"), "family")
@pytest.mark.parametrize("adapter_name", ["train", "keys", "0"])
@on_every_pair
def test_any_allowed_adapter_name_works(name: str, family: str, adapter_name: str) -> None:
    model, x = build(family), inputs(family)
    adapter = active(model, name, adapter_name)
    out = logits(model, x)
    with byway.disabled(model):
        assert not torch.equal(logits(model, x), out)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    randomize(adapter.named_parameters(), seed=9)
    model.load_state_dict(state)
    assert torch.equal(logits(model, x), out)
    byway.detach(model, adapter_name)
    assert byway.adapters(model) == {}


@on_every_pair
def test_positional_and_keyword_calls_agree(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    active(model, name)
    first, *_ = x
    rest = {k: v for k, v in x.items() if k != first}
    assert torch.equal(model(x[first], **rest).logits, logits(model, x))


@pytest.mark.covering_sample(("name", "twin_of"), "family")
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@on_every_pair
def test_copies_keep_the_side_paths_and_are_independent(name: str, family: str, twin_of: Any) -> None:
    model, x = build(family), inputs(family)
    bare = logits(model, x)
    active(model, name)
    out = logits(model, x)
    twin = twin_of(model)
    assert torch.equal(logits(twin, x), out)
    randomize(byway.adapters(twin)["default"].named_parameters(), seed=8)
    assert torch.equal(logits(model, x), out)
    byway.detach(twin)
    assert torch.equal(logits(twin, x), bare)
    assert torch.equal(logits(model, x), out)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.covering_sample
@on_every_pair
def test_compiles_as_one_graph(name: str, family: str, fresh_dynamo: None) -> None:
    model, x = build(family), inputs(family)
    active(model, name)
    out = logits(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**x).logits, out)
    with byway.disabled(model):
        assert torch.equal(compiled(**x).logits, logits(model, x))
    assert torch.equal(compiled(**x).logits, out)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@on_every_pair
def test_checkpointing_by_either_switch_gives_the_same_gradients(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    adapter = active(model, name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for config in (model.config,):
        for key in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout"):
            if key in vars(config):
                setattr(config, key, 0.0)
    for module in model.modules():
        for key in ("attention_dropout", "dropout_prob", "dropout"):
            if isinstance(vars(module).get(key), float):
                setattr(module, key, 0.0)
    plain = gradients(model, adapter, x)
    if any(side.detached for _, side in adapter.side_paths()):
        with pytest.raises(ConfigError, match="no layer keeps activations"), checkpointed(model):
            pass
        ours = plain
    else:
        with checkpointed(model) as layers:
            assert layers > 0
            ours = gradients(model, adapter, x)
    model.gradient_checkpointing_enable()
    theirs = gradients(model, adapter, x)
    model.gradient_checkpointing_disable()
    assert plain.keys() == ours.keys() == theirs.keys() == dict(adapter.named_parameters()).keys()
    for key, expected in plain.items():
        assert torch.equal(ours[key], expected), key
        # transformers' switch makes the embeddings require a gradient; torch then uses another attention kernel on T5
        assert (theirs[key] - expected).norm() <= 1e-5 * expected.norm() or not has_an_effect(key), key


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_after_transformers_switch_is_off_again_nothing_below_is_kept_and_one_graph_compiles(name: str, fresh_dynamo: None) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, method_of(name, layers="2-"))
    randomize(adapter.named_parameters())
    model.train()
    expected = gradients(model, adapter, x)
    model.gradient_checkpointing_enable()
    assert graph_below(model, x) == [True, True], "this test is about transformers' embedding hook"
    with frontier(model) as cuts:
        assert [cut.first for cut in cuts] == ["model.layers.2"]
        found = gradients(model, adapter, x)
    model.gradient_checkpointing_disable()
    assert graph_below(model, x) == [False, False]
    torch.compile(model, backend="eager", fullgraph=True)(**x)
    after = gradients(model, adapter, x)
    byway.detach(model)
    assert not [key for key in vars(model) if key.endswith("checkpointing_disable")]
    for key, value in expected.items():
        assert torch.equal(found[key], value)
        assert torch.equal(after[key], value)


def graph_below(model: Any, x: dict[str, Any]) -> list[bool]:
    """For each layer below the trained one: True if its output requires a gradient (its activations are kept)."""
    below: list[bool] = []
    handles = [layer.register_forward_hook(lambda m, a, out: below.append(out.requires_grad)) for layer in model.model.layers[:2]]
    logits(model, x)
    for handle in handles:
        handle.remove()
    return below


@pytest.mark.covering_sample(times=2)
@on_every_pair
def test_evaluating_between_two_training_steps_changes_nothing(name: str, family: str) -> None:
    x = inputs(family)

    def run(evaluate: bool) -> list[torch.Tensor]:
        model = build(family)
        adapter = active(model, name)
        optimizer = torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=1e-2)
        for _ in range(2):
            model.train()
            torch.manual_seed(5)
            optimizer.zero_grad()
            logits(model, x).float().pow(2).mean().backward()
            optimizer.step()
            if evaluate:
                model.eval()
                with torch.no_grad():
                    logits(model, x)
        return [p.detach() for _, p in adapter.named_parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.covering_sample(times=2)
@on_decoders
def test_cached_generation_equals_uncached_also_with_beams(name: str, family: str) -> None:
    model = build(family)
    active(model, name)
    ids = inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@on_decoders
def test_left_right_and_no_padding_agree_on_real_tokens(name: str, family: str) -> None:
    model = build(family)
    active(model, name)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(2))
    pad = torch.zeros(1, 3, dtype=torch.long)
    alone = model(input_ids=ids).logits
    positions = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.arange(6)[None]], dim=1)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    left = model(input_ids=torch.cat([pad, ids], 1), attention_mask=mask, position_ids=positions).logits[:, 3:]
    right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=mask.flip(1)).logits[:, :6]
    assert (left - alone).abs().max() < PADDING_MAXIMUM
    assert (right - alone).abs().max() < PADDING_MAXIMUM


@on_every_pair
@torch.no_grad()  # a loaded adapter is frozen, and torch chooses the attention kernel by what requires a gradient
def test_saved_and_loaded_into_a_fresh_base_it_gives_the_same_output(name: str, family: str, tmp_path: Any) -> None:
    model, x = build(family), inputs(family)
    active(model, name).save(tmp_path / "adapter")
    out = logits(model, x)
    torch.manual_seed(999)  # so that freshly initialized weights cannot pass for loaded ones
    other = build(family)
    byway.load(other, tmp_path / "adapter")
    assert same(name, family, logits(other, x), out)
    with byway.disabled(other):
        assert not torch.equal(logits(other, x), out)


@on_mergeable
def test_merged_equals_unmerged(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    bare = logits(model, x)
    keys = list(model.state_dict())
    active(model, name)
    unmerged = logits(model, x)
    byway.merge(model)
    merged = logits(model, x)
    assert list(model.state_dict()) == keys
    assert hooks(model) == 0
    assert (merged - unmerged).norm() / unmerged.norm() < MERGE_RELATIVE
    assert (unmerged - bare).norm() / bare.norm() > 100 * MERGE_RELATIVE


@pytest.mark.parametrize(
    ("name", "family"),
    [*((n, next(f for own, f in PAIRS if own == n)) for n in methods.names() if not methods.load(n).mergeable), *sorted(UNMERGEABLE)],
)
def test_what_cannot_be_merged_says_so_and_changes_nothing(name: str, family: str) -> None:
    model, x = build(family), inputs(family)
    active(model, name)
    out, before = logits(model, x), digest(model)
    with pytest.raises(NotMergeable, match=f"'default' .{type(method_of(name)).__name__}. cannot be merged"):
        byway.merge(model)
    assert torch.equal(logits(model, x), out)
    assert digest(model) == before


@pytest.mark.parametrize(("pair", "says"), REFUSED.items(), ids=lambda value: "-".join(value) if isinstance(value, tuple) else "")
def test_what_does_not_go_together_is_refused_with_the_model_untouched(pair: tuple[str, str], says: str) -> None:
    model = build(pair[1])
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(BywayError, match=says):
        byway.attach(model, method_of(pair[0]))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert hooks(model) == 0
