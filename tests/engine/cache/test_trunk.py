"""The frozen-trunk cache: the model returns the same logits and gradients from cached states, in any batch layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.attention import packed
from byway.engine.attention.packing import packing
from byway.engine.backward.frontier import frontier
from byway.engine.cache import TrunkCache, shortcuts
from byway.engine.cache.store import decode, encode
from byway.engine.cache.units import cut_units
from byway.errors import AdapterError
from tests import tiny

LENGTHS = (5, 9, 3, 12, 7, 7, 1, 4, 11)
UNIT = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Documents:
    """Texts (or pictures) for a family, in batches of several layouts."""

    def __init__(self, family: str, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.family = family
        self.rows = [torch.randint(3, tiny.VOCABULARY, (n,), generator=g) for n in LENGTHS]
        self.pictures = torch.randn(len(LENGTHS), 3, 16, 16, generator=g)
        self.lengths: Any = len(LENGTHS) if family == "vit" else list(LENGTHS)

    def padded(self, indices: Sequence[int], side: str = "right") -> dict[str, Tensor]:
        if self.family == "vit":
            return {"pixel_values": self.pictures[list(indices)]}
        width = max(LENGTHS[i] for i in indices)
        ids, mask = torch.zeros(len(indices), width, dtype=torch.long), torch.zeros(len(indices), width, dtype=torch.long)
        for row, i in enumerate(indices):
            place = slice(0, LENGTHS[i]) if side == "right" else slice(width - LENGTHS[i], width)
            ids[row, place], mask[row, place] = self.rows[i], 1
        batch = {"input_ids": ids, "attention_mask": mask}
        return {**batch, "decoder_input_ids": ids[:, :3]} if self.family == "t5" else batch

    def packed(self, indices: Sequence[int]) -> dict[str, Tensor]:
        bounds = torch.tensor([0, *torch.tensor([LENGTHS[i] for i in indices]).cumsum(0).tolist()], dtype=torch.int32)
        return {
            "input_ids": torch.cat([self.rows[i] for i in indices])[None],
            "position_ids": torch.cat([torch.arange(LENGTHS[i]) for i in indices])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
        }


def upper(family: str) -> byway.Method:
    """LoRA above frozen layers: in the last of three, or in T5's decoder."""
    if family == "t5":
        return byway.LoRA(rank=4, targets=r".*decoder.*\.(q|v)")
    return byway.LoRA(rank=4, targets="all-linear", layers="2-")


def adapted(family: str, method: byway.Method | None = None, implementation: str = "sdpa") -> Any:
    model: Any = tiny.build(family)
    model.set_attn_implementation(implementation)
    adapter = byway.attach(model, method or upper(family))
    tiny.randomize(adapter.named_parameters())
    return model


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits with zeros at padding, the adapters' gradients of the mean of their squares)."""
    model.zero_grad()
    logits = model(**batch).logits
    if logits.ndim == 3 and "attention_mask" in batch and "decoder_input_ids" not in batch:
        logits = logits * batch["attention_mask"][..., None]
    logits.pow(2).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-6) -> None:
    """Compare with a tolerance relative to the largest element."""
    assert float((one[0] - other[0]).abs().max()) <= tolerance * float(one[0].abs().max())
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).abs().max()) <= 10 * tolerance * max(float(gradient.abs().max()), 1e-2), name


@contextmanager
def counted(model: nn.Module, paths: Sequence[str]) -> Iterator[list[str]]:
    """List the submodules of these modules that run."""
    calls: list[str] = []
    inner = [(p, m) for path in paths for p, m in model.get_submodule(path).named_modules() if p]
    handles = [module.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, module in inner]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replay_gives_the_logits_and_gradients_of_the_live_model(family: str, implementation: str) -> None:
    model, documents = adapted(family, implementation=implementation), Documents(family)
    cache = TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT)
    for indices in ([4, 2, 8, 0], [6], [3, 1, 7, 5]):
        batch = documents.padded(indices)
        with frontier(model):
            live = gradients(model, batch)
        with cache.replay(indices), counted(model, [*cache.shortcut.skips, *cache.shortcut.gives]) as calls:
            replayed = gradients(model, batch)
        assert_same(live, replayed)
        assert not [name for name in calls if "byway" not in name]
        assert_same(live, gradients(model, batch))  # the model is as before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_packed_padded_and_left_padded_batches_read_the_same_states(family: str, implementation: str) -> None:
    model, documents = adapted(family, implementation=implementation), Documents(family)
    indices = [4, 2, 8, 0]
    for collate in (documents.padded, documents.packed):
        cache = TrunkCache(model, collate, documents.lengths, unit_tokens=UNIT)
        with packing(model), packed():
            batch = documents.packed(indices)
            live = gradients(model, batch)
            with cache.replay(indices):
                assert_same(live, gradients(model, batch))
        batch = documents.padded(indices, side="left")
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        live = gradients(model, batch)
        with cache.replay(indices):
            assert_same(live, gradients(model, batch))


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "gpt2"])
@pytest.mark.parametrize("drop", [None, (1,), (1, 2)])
def test_a_ladder_climbs_beside_cached_taps(family: str, drop: tuple[int, ...] | None) -> None:
    for mix in (False, True):
        method = byway.LadderSideTuning(reduction=4, drop=drop, mix_output=mix)
        model, documents = adapted(family, method), Documents(family)
        way = shortcuts(model)[-1 if mix else 0]
        cache = TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT, shortcut=way)
        assert len(way.gives) == 3 - len(drop or ()) + (mix and drop == (1, 2))
        indices = [4, 2, 8, 0]
        batch = documents.padded(indices)
        live = gradients(model, batch)
        with cache.replay(indices):
            assert_same(live, gradients(model, batch))


def test_a_bart_decoder_trains_on_the_cached_output_of_its_encoder() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=97, d_model=32, max_position_embeddings=64, **sizes, **heads)).eval()
    adapter = byway.attach(model, byway.LoRA(rank=4, targets=r".*decoder.*\.(q_proj|v_proj)"))
    tiny.randomize(adapter.named_parameters())
    documents = Documents("t5")
    cache = TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT)
    assert cache.shortcut.where == "the encoder's output"
    batch = documents.padded([4, 2, 8, 0])
    with frontier(model):
        live = gradients(model, batch)
    with cache.replay([4, 2, 8, 0]), counted(model, ["model.encoder"]) as calls:
        assert_same(live, gradients(model, batch))
    assert not calls


@pytest.mark.parametrize(
    ("family", "kept"),
    [("bert", lambda n: (0,)), ("roberta", lambda n: (0,)), ("llama", lambda n: tuple(range(1, n)))],
)
def test_above_the_last_layer_only_the_rows_that_are_read_need_to_be_kept(family: str, kept: Callable[[int], tuple[int, ...]]) -> None:
    model: Any = tiny.build(family)
    heads = {"bert": byway.Full(targets=["classifier"]), "roberta": byway.Full(targets=["classifier.dense"])}
    adapter = byway.attach(model, heads.get(family, byway.LoRA(rank=2, targets=["lm_head"])))
    tiny.randomize(adapter.named_parameters())
    documents = Documents(family)
    positions = [kept(n) for n in LENGTHS]
    cache = TrunkCache(model, documents.padded, documents.lengths, kept=positions, unit_tokens=UNIT)
    assert cache.bytes == 32 * 4 * sum(map(len, positions))
    batch = documents.padded([4, 2, 8, 0])
    live = gradients(model, batch)
    with cache.replay([4, 2, 8, 0]):
        replayed = gradients(model, batch)
    if family == "llama":
        seen = batch["attention_mask"].clone()
        seen[:, 0] = 0
        assert torch.allclose(live[0] * seen[..., None], replayed[0] * seen[..., None], atol=1e-6)
    else:
        assert_same(live, replayed)


def test_a_frozen_adapter_below_is_part_of_what_is_cached_and_acts_once() -> None:
    model, documents = tiny.build("llama"), Documents("llama")
    below = byway.attach(model, byway.BottleneckAdapter(reduction=4), "below")
    tiny.randomize(below.named_parameters(), scale=0.5)
    for _, parameter in below.named_parameters():
        parameter.requires_grad_(False)
    above = byway.attach(model, byway.LoRA(rank=4, targets="all-linear", layers="2-"), "above")
    tiny.randomize(above.named_parameters())
    cache = TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT)
    batch = documents.padded([4, 2, 8, 0])
    with frontier(model):
        live = gradients(model, batch)
    with cache.replay([4, 2, 8, 0]):
        assert_same(live, gradients(model, batch))
    before = cache.key
    with torch.no_grad():
        next(below.named_parameters())[1].add_(1e-3)
    assert TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT).key != before


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (byway.LoRA(rank=2, targets="all-linear"), "the first of 3 layers is trained"),
        (byway.PromptTuning(num_virtual_tokens=3), "something that feeds the first layer is trained"),
        (byway.LoRA(rank=2, targets=["embed_tokens"]), "something that feeds the first layer is trained"),
    ],
)
def test_what_is_trained_below_is_said(method: byway.Method, reason: str) -> None:
    model, documents = adapted("llama", method), Documents("llama")
    with pytest.raises(AdapterError, match=reason):
        TrunkCache(model, documents.padded, documents.lengths)


def test_inside_a_t5_stack_nothing_is_cached() -> None:
    model, documents = adapted("t5", byway.LoRA(rank=2, targets=r"encoder\.block\.2.*\.q")), Documents("t5")
    with pytest.raises(AdapterError, match="something in the encoder, or below it, is trained"):
        TrunkCache(model, documents.padded, documents.lengths)


def test_a_frozen_prompt_that_lengthens_the_rows_is_refused() -> None:
    model, documents = tiny.build("llama"), Documents("llama")
    prompt = byway.attach(model, byway.PromptTuning(num_virtual_tokens=3), "prompt")
    for _, parameter in prompt.named_parameters():
        parameter.requires_grad_(False)
    byway.attach(model, byway.LoRA(rank=2, targets="all-linear", layers="2-"), "above")
    with pytest.raises(AdapterError, match=r"the layers see \d+ positions for 1 tokens: something adds tokens to the input"):
        TrunkCache(model, documents.padded, documents.lengths)


def test_a_batch_of_other_documents_is_refused() -> None:
    model, documents = adapted("llama"), Documents("llama")
    cache = TrunkCache(model, documents.padded, documents.lengths)
    with (
        cache.replay([3, 1]),
        pytest.raises(AdapterError, match="2 rows and 7 columns is not made of documents of 12, 9 tokens"),
    ):
        model(**documents.padded([4, 2]))


def test_an_exception_inside_a_replay_leaves_the_model_as_it_was() -> None:
    model, documents = adapted("gpt2"), Documents("gpt2")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    cache = TrunkCache(model, documents.padded, documents.lengths)
    with pytest.raises(RuntimeError, match="stop"), cache.replay([0]):
        raise RuntimeError("stop")
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert vars(module).get("forward") is before[name].get("forward")
        assert len(module._forward_hooks) == len(before[name]["_forward_hooks"])


def test_building_moves_no_generator_and_no_mode_and_acts_without_dropout() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config)
    byway.attach(model, byway.LoRA(rank=2, targets="all-linear", layers="2-"))
    documents = Documents("bert")
    model.train()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    one = TrunkCache(model, documents.padded, documents.lengths, unit_tokens=UNIT)
    one.build()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    two = TrunkCache(model.eval(), documents.padded, documents.lengths, unit_tokens=UNIT)
    for a, b in zip(one.states(range(9))["bert.encoder.layer.1"], two.states(range(9))["bert.encoder.layer.1"], strict=True):
        assert torch.equal(a, b)


def test_states_do_not_depend_on_who_asks_for_which_documents_first() -> None:
    model, documents = adapted("llama"), Documents("llama")
    one = TrunkCache(model, documents.packed, documents.lengths, unit_tokens=UNIT)
    two = TrunkCache(model, documents.packed, documents.lengths, unit_tokens=UNIT)
    for i in (8, 0, 3):
        two.states([i])
    path = "model.layers.1"
    for a, b in zip(one.states(range(9))[path], two.states(range(9))[path], strict=True):
        assert torch.equal(a, b)


def test_units_follow_from_the_lengths_alone() -> None:
    units = cut_units([5, 9, 3, 12, 7, 7, 1, 4, 30], tokens=24)
    assert units.members == ((6, 2, 7, 0), (4, 5), (1, 3), (8,))
    assert units.place[0] == (0, 1 + 3 + 4) and units.place[3] == (2, 9) and units.place[8] == (3, 0)
    for unit in units.members[:-1]:
        assert len(unit) * max([5, 9, 3, 12, 7, 7, 1, 4, 30][i] for i in unit) <= 24


@pytest.mark.parametrize(("kept", "bound"), [("bf16", 4e-3), ("int8", 2e-2)])
def test_an_approximation_is_as_exact_as_it_says_also_with_outliers(kept: Any, bound: float, seed: int) -> None:
    states = torch.randn(64, 96)
    states[:, 3] *= 200  # a channel that is large everywhere
    states[0] *= 50  # and a token that is large in all channels
    again = decode("x", encode("x", states, kept), 0, 64, kept, torch.float32)
    rest = [i for i in range(96) if i != 3]
    assert float((again - states).norm() / states.norm()) < bound
    for row in range(64):  # small numbers stay precise next to large ones
        assert float((again[row, rest] - states[row, rest]).norm() / states[row, rest].norm()) < bound
    assert torch.equal(decode("x", encode("x", states, "same"), 3, 9, "same", torch.float32), states[3:9])


def test_the_error_of_an_approximation_is_measured_on_the_states() -> None:
    model, documents = adapted("llama"), Documents("llama")
    errors = {kept: TrunkCache(model, documents.padded, documents.lengths, dtype=kept).error(range(9)) for kept in ("same", "bf16", "int8")}
    assert errors["same"] == 0.0 < errors["bf16"] < 4e-3 and 0 < errors["int8"] < 2e-2
