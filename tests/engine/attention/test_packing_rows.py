"""Rows packed through the trunk give the same loss, gradients and logits as padded ones, whatever the head reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import byway
from byway import methods
from byway.core.attention import packed
from byway.data.collate import pack_labelled, pad_labelled
from byway.data.labelled import LabelledExample
from byway.engine.attention.packing import packing
from byway.engine.attention.unpack import packed_rows
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.frontier import frontier
from tests import tiny, zoo
from tests.engine.levers import KEYS, proved
from tests.tiny import randomize

RELATIVE = 1e-5
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "modernbert")
DECODERS = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "gemma3_text", "mixtral")
FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 1, "initial_rank": 3, "initial_steps": 1, "final_steps": 1},
    "bottleneck_adapter": {"reduction": 4},
    "prefix_tuning": {"hidden_size": 16},
}


def examples(seed: int = 0, lengths: tuple[int, ...] = (9, 4, 12, 1, 6), types: bool = False) -> list[LabelledExample]:
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, zoo.MODELS["bert"][2]["vocab_size"], (n,), generator=g).tolist() for n in lengths]
    return [
        LabelledExample(ids, i % 2, f"row {i}", [int(j > 2) for j in range(len(ids))] if types else None) for i, ids in enumerate(drawn)
    ]


def loss(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool = False) -> tuple[Tensor, int]:
    """The loss of the classification task, written out."""
    return F.cross_entropy(logits(model, batch), batch["labels"], reduction="sum"), len(batch["labels"])


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "cu_seq_lens_q" not in inputs:
        return model(**inputs).logits
    with packed(), packed_rows(inputs) as rows:
        return model(**rows).logits


def classifier(name: str, implementation: str = "sdpa") -> Any:
    stem = zoo.MODELS[name][0].split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    model = zoo.build(name, f"{stem}ForSequenceClassification")
    model.config.pad_token_id = 0
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():  # biases of 0 and norms of 1 would hide mistakes
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(implementation)
    return model


def adapted(model: nn.Module, method: Any = None) -> byway.Adapter:
    adapter = byway.attach(model, method or byway.LoRA(rank=2))
    randomize(adapter.named_parameters())
    return adapter


def measured(model: nn.Module, adapter: byway.Adapter, batch: Mapping[str, Any]) -> tuple[float, Tensor]:
    total, _ = loss(model, batch)
    gradients = torch.autograd.grad(total, [p for _, p in adapter.named_parameters()], allow_unused=True)
    return float(total.detach()), torch.cat([g.flatten() for g in gradients if g is not None])


def assert_equal(own: tuple[float, Tensor], plain: tuple[float, Tensor]) -> None:
    assert own[0] == pytest.approx(plain[0], rel=RELATIVE)
    assert plain[1].norm() > 0
    assert (own[1] - plain[1]).norm() <= RELATIVE * plain[1].norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS + DECODERS)
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_rows(name: str, implementation: str) -> None:
    model = classifier(name, implementation)
    adapter = adapted(model)
    rows = examples(types="token_type_ids" in inspect.signature(type(model).forward).parameters)
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with packing(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0)), plain)
        # padded batches work within the context too
        assert_equal(measured(model, adapter, pad_labelled(rows, 0)), plain)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ENCODERS)
def test_changing_one_row_leaves_the_others_bit_equal(name: str) -> None:
    model, rows = classifier(name), examples()
    changed = [LabelledExample([7] * 4, 0, "row 1") if i == 1 else row for i, row in enumerate(rows)]
    with packing(model), torch.no_grad():
        before, after = logits(model, pack_labelled(rows, 0)), logits(model, pack_labelled(changed, 0))
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_rows_hold_no_padding_between_entrance_and_exit(name: str) -> None:
    model, rows = classifier(name), examples()
    seen: list[tuple[int, ...]] = []
    stack = model.get_submodule(byway.core.families.facts(model).stacks["encoder"][0])
    stack.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with packing(model), torch.no_grad():
        logits(model, pack_labelled(rows, 0))
        assert {shape[:2] for shape in seen} == {(1, 32)}
        seen.clear()
        logits(model, pad_labelled(rows, 0))
        assert {shape[:2] for shape in seen} == {(5, 12)}


@pytest.mark.parametrize(
    ("model_class", "pooling"),
    [("ModernBertForSequenceClassification", "mean"), ("ModernBertForSequenceClassification", "cls"), ("BertForTokenClassification", "")],
)
def test_a_head_that_reads_every_token_sees_the_padded_mask(model_class: str, pooling: str) -> None:
    name = "modernbert" if pooling else "bert"
    settings = zoo.config(name)
    if pooling:
        settings.classifier_pooling = pooling
    torch.manual_seed(2)
    model = getattr(transformers, model_class)(settings).eval()
    batch = pad_labelled(examples(), 0)
    with torch.no_grad():
        plain = logits(model, batch)
        with packing(model):
            own = logits(model, pack_labelled(examples(), 0))
    real = batch["attention_mask"].bool() if plain.ndim == 3 else slice(None)
    assert own.shape == plain.shape
    assert (own[real] - plain[real]).abs().max() < RELATIVE


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", [n for n in methods.names() if methods.load(n).packable])
def test_every_packable_method_proves_itself_on_packed_rows(name: str, family: str) -> None:
    model, rows = tiny.build(family), examples()
    adapter = adapted(model, methods.load(name)(**FIELDS.get(name, {})))
    levers = proved(model, pad_labelled(rows, 0), pack_labelled(rows, 0), {"labels_only": "off"}, loss=loss)
    assert (levers.packed, levers.has("frontier")) == (True, True), levers.line(KEYS)
    # the proof has a larger tolerance than this test
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with packing(model), frontier(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0)), plain)


def test_packed_rows_are_recomputed_as_they_were() -> None:
    model, rows = tiny.build("bert"), examples()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(rows, 0))
    model.train()
    with packing(model), checkpointed(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0)), plain)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mpnet", "does not go through transformers' registry"),
        ("deberta", "does not go through transformers' registry"),
        ("deberta-v2", "does not go through transformers' registry"),
        ("bloom", "does not go through transformers' registry"),
        ("stablelm", "does not reproduce the plain loss"),  # its layers do not pass the bounds on to the attention
        ("bart", "2 stacks"),
        ("t5", "2 stacks"),
    ],
)
def test_a_model_that_cannot_be_packed_is_not_and_says_why(name: str, reason: str) -> None:
    model = classifier(name) if name not in ("mpnet", "deberta", "deberta-v2", "bloom") else zoo.build(name, _class_of(name))
    model.config.pad_token_id = 0
    adapted(model)
    end = model.config.to_dict().get("eos_token_id") or 2
    rows = [LabelledExample([*[t for t in row.input_ids if t != end], end], row.label, row.where) for row in examples()]
    levers = proved(model, pad_labelled(rows, 0), pack_labelled(rows, 0), {"labels_only": "off", "frontier": "off"}, loss=loss)
    assert not levers.packed
    assert reason in levers.reasons["pack"], levers.line(KEYS)
    with pytest.raises(byway.ConfigError, match=r"engine\.pack is on, but"):
        proved(model, pad_labelled(rows, 0), pack_labelled(rows, 0), {"pack": "on"}, loss=loss)


def _class_of(name: str) -> str:
    return f"{zoo.MODELS[name][0].split('For')[0]}ForSequenceClassification"


def test_what_only_a_pack_can_do_is_refused_outside_packing() -> None:
    model = tiny.build("bert")
    with pytest.raises(byway.AdapterError, match=r"inside packing\(model\) only"):
        logits(model, pack_labelled(examples(), 0))


def test_a_lever_that_fails_is_off_with_the_error_and_one_that_does_not_apply_is_not_tried() -> None:
    model, rows = tiny.build("bert"), examples()
    adapted(model)

    def broken(model: nn.Module, batch: Mapping[str, Any], *, labels_only: bool) -> tuple[Tensor, int]:
        if "cu_seq_lens_q" in batch:
            raise TypeError("forward() got an unexpected keyword argument 'cu_seq_lens_q'")
        assert not labels_only
        return loss(model, batch)

    found = proved(model, pad_labelled(rows, 0), pack_labelled(rows, 0), {}, loss=broken, cannot={"labels_only": "no head over tokens"})
    assert not found.packed
    assert "TypeError: forward() got an unexpected keyword" in found.reasons["pack"]
    assert found.reasons["labels_only"] == "no head over tokens"
    assert found.has("frontier")
