"""The last layer at the positions read gives the same loss and gradients, and only those positions pass through its
maps."""

from __future__ import annotations

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
from byway.core.families import facts
from byway.core.slots import Slot
from byway.data.collate import pack_batch, pack_labelled, pad_batch, pad_labelled
from byway.data.encode import Example
from byway.data.labelled import LabelledExample
from byway.engine.attention.packing import packing
from byway.engine.attention.unpack import packed_rows
from byway.engine.backward.checkpointing import checkpointed
from byway.engine.backward.frontier import frontier
from byway.engine.backward.recompute import recomputed
from byway.engine.last_layer import last_layer, layers_run, maps_by_row, positions_read, read_elsewhere
from byway.engine.loss.tokens import token_loss
from tests import tiny, zoo
from tests.engine.attention.test_packing_rows import DECODERS, ENCODERS, FIELDS, adapted, assert_equal, classifier, examples
from tests.engine.losses import CAUSAL
from tests.tiny import randomize

REPEATED = ("albert",)
"""Families that run one layer several times."""


def marks(rows: list[LabelledExample], first: bool, packed: bool) -> Tensor:
    """Mark the first or last token of each row: (1, T) or (n, w)."""
    lengths = [len(row.input_ids) for row in rows]
    table = torch.zeros((1, sum(lengths)) if packed else (len(rows), max(lengths)), dtype=torch.bool)
    for i, length in enumerate(lengths):
        place = 0 if first else length - 1
        table[(0, sum(lengths[:i]) + place) if packed else (i, place)] = True
    return table


def loss(model: nn.Module, batch: Mapping[str, Any], read: Tensor | None) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with positions_read(read):
        if "cu_seq_lens_q" not in inputs:
            return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")
        with packed(), packed_rows(inputs) as rows:
            return F.cross_entropy(model(**rows).logits, batch["labels"], reduction="sum")


def measured(model: nn.Module, adapter: byway.Adapter, batch: Mapping[str, Any], read: Tensor | None = None) -> tuple[float, Tensor]:
    total = loss(model, batch, read)
    gradients = torch.autograd.grad(total, [p for _, p in adapter.named_parameters()], allow_unused=True)
    return float(total.detach()), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ENCODERS + DECODERS if name not in REPEATED])
def test_a_classifier_has_the_loss_and_gradients_of_the_whole_last_layer(name: str, implementation: str) -> None:
    model = classifier(name, implementation)
    adapter = adapted(model)
    rows, first = examples(), name in ENCODERS
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with last_layer(model):
        assert_equal(measured(model, adapter, pad_labelled(rows, 0), marks(rows, first, packed=False)), plain)
        assert_equal(measured(model, adapter, pad_labelled(rows, 0)), plain)  # without positions, all are read
        with packing(model):
            assert_equal(measured(model, adapter, pack_labelled(rows, 0), marks(rows, first, packed=True)), plain)
    assert_equal(measured(model, adapter, pad_labelled(rows, 0)), plain)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "gpt2", "opt"])
def test_only_the_positions_that_are_read_go_through_the_last_layers_maps(name: str) -> None:
    model, rows = classifier(name), examples()
    paths = maps_by_row(model)
    own = facts(model)
    ((_, layers),) = own.stacks.items()
    skipped = {*own.projections("k"), *own.projections("v")}
    linear = [p for p in (*own.attention_linears, *own.feed_forward_linears) if p.startswith(layers[-1]) and p not in skipped]
    assert linear
    assert all(any(path == p or path.startswith(f"{p}.") for p in paths) for path in linear)
    seen: dict[str, tuple[int, ...]] = {}
    queries: list[int] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda module, args, path=path: seen.__setitem__(path, tuple(args[0].shape[:-1])))
    true_attention = F.scaled_dot_product_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        queries.append(query[..., 0].numel() // model.config.num_attention_heads)
        return true_attention(query, *args, **kwargs)

    with last_layer(model), packing(model), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", counted)
        loss(model, pack_labelled(rows, 0), marks(rows, name in ENCODERS, packed=True))
    assert {path: torch.Size(seen[path]).numel() for path in linear} == dict.fromkeys(linear, 5)
    below = [path for path in (*own.attention_linears, *own.feed_forward_linears) if path.startswith(layers[0])]
    assert {torch.Size(seen[path]).numel() for path in below} == {32}
    assert queries[-1] == 5  # one call for the five documents
    assert sum(queries[:-1]) == 32 * (len(layers) - 1)


def test_documents_of_very_different_lengths_are_attended_one_by_one() -> None:
    model, rows = classifier("bert"), examples(lengths=(40, 1, 1, 2, 1, 1, 2, 1, 1))
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with last_layer(model), packing(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0), marks(rows, True, packed=True)), plain)


def test_several_tokens_of_a_row_and_none_of_another() -> None:
    """Queries of a causal model would need masks, so its attention runs at all positions, but its maps do not."""
    for name in ("bert", "llama"):
        model, rows = classifier(name), examples()
        adapter = adapted(model)
        trunk = model.get_submodule(facts(model).require("trunk"))
        read = torch.zeros(1, 32, dtype=torch.bool)
        read[0, [0, 3, 8, 14, 15, 31]] = True
        found = []
        for given in (None, read):
            with last_layer(model), packing(model), packed(), positions_read(given):
                batch = pack_batch([Example(row.input_ids, row.input_ids, row.where) for row in rows])
                batch.pop("labels")
                hidden = trunk(**batch).last_hidden_state[read]
            gradients = torch.autograd.grad(hidden.square().sum() * 1e-3, [p for _, p in adapter.named_parameters()], allow_unused=True)
            found.append((float(hidden.detach().sum()), torch.cat([g.flatten() for g in gradients if g is not None])))
        assert_equal(found[1], found[0])


def labelled_late(lengths: tuple[int, ...] = (9, 4, 12, 6)) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 90, (n,), generator=g).tolist() for n in lengths]
    return [Example(ids, [-100] * (len(ids) * 2 // 3) + ids[len(ids) * 2 // 3 :], "row") for ids in drawn]


@pytest.mark.parametrize("labels_only", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_reads_what_predicts_a_label(name: str, labels_only: bool) -> None:
    model = zoo.build(name)
    adapter = adapted(model)
    rows = labelled_late()

    def of(batch: Mapping[str, Any]) -> tuple[float, Tensor]:
        total, _ = token_loss(model, batch, labels_only=labels_only)
        gradients = torch.autograd.grad(total, [p for _, p in adapter.named_parameters()], allow_unused=True)
        return float(total.detach()), torch.cat([g.flatten() for g in gradients if g is not None])

    plain = of(pad_batch(rows, 0))
    with last_layer(model):
        assert_equal(of(pad_batch(rows, 0)), plain)


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.load(n).packable and n != "ladder_side_tuning"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_packable_method_stands_beside_it(name: str, family: str) -> None:
    model, rows = (tiny.build("bert"), examples()) if family == "bert" else (classifier("llama"), examples())
    adapter = adapted(model, methods.load(name)(**FIELDS.get(name, {})))
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with packing(model), frontier(model), recomputed(model, smallest=1), last_layer(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0), marks(rows, family == "bert", packed=True)), plain)


def test_a_recomputed_last_layer_is_what_it_was() -> None:
    model, rows = classifier("bert"), examples()
    model.eval()
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(rows, 0))
    with packing(model), last_layer(model), checkpointed(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0), marks(rows, True, packed=True)), plain)


def test_a_ladder_reads_the_whole_last_layer_so_it_is_refused() -> None:
    model = tiny.build("bert")
    byway.attach(model, byway.LadderSideTuning(reduction=4))
    with pytest.raises(byway.AdapterError, match="a side path reads the whole output of"), last_layer(model):
        pass


class _Reads(byway.SidePath):
    """Reads the output of a module at every position."""

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        return out


@pytest.mark.parametrize("path", ["bert.encoder", "bert.encoder.layer.1"])
def test_what_reads_a_layers_or_a_stacks_output_keeps_it_whole(path: str) -> None:
    model = classifier("bert")
    module = model.get_submodule(path)
    slot = Slot(module)
    module.add_module("byway", slot)
    slot.put(module, "default", _Reads())
    assert maps_by_row(model)  # attached but not active
    slot.activate(("default",))
    with pytest.raises(byway.AdapterError, match=f"a side path reads the whole output of {path}"):
        maps_by_row(model)


def test_a_module_that_is_called_or_answers_otherwise_is_named() -> None:
    model, rows = classifier("bert"), examples()
    batch, read = pad_labelled(rows, 0), marks(rows, True, packed=False)
    model.config.chunk_size_feed_forward = 4
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    with last_layer(model), pytest.raises(byway.AdapterError, match="is not called with the states of every position"):
        loss(model, batch, read)
    model = classifier("bert")
    model.bert.encoder.layer[-1].intermediate.register_forward_hook(lambda module, args, out: out[..., :1, :].squeeze(0))
    with last_layer(model), pytest.raises(byway.AdapterError, match="does not return one row per position"):
        loss(model, batch, read)


def test_packed_windows_narrower_than_the_rows_are_kept() -> None:
    model, rows = classifier("mistral"), examples(lengths=(14, 5, 11))
    model.config.sliding_window = 4
    adapter = adapted(model)
    plain = measured(model, adapter, pad_labelled(rows, 0))
    model.config.sliding_window = 64
    assert measured(model, adapter, pad_labelled(rows, 0))[0] != pytest.approx(plain[0], rel=1e-4)
    model.config.sliding_window = 4
    with last_layer(model), packing(model):
        assert_equal(measured(model, adapter, pack_labelled(rows, 0), marks(rows, False, packed=True)), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_told_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    rows = examples()
    batch = pad_labelled(rows, 0)
    found = {}
    for pooling in ("cls", "mean"):
        settings = zoo.config("modernbert")
        settings.classifier_pooling = pooling
        torch.manual_seed(0)
        model = transformers.ModernBertForSequenceClassification(settings).to(dtype).eval()
        found[pooling] = read_elsewhere(model, lambda model=model: loss(model, batch, marks(rows, True, packed=False)))
    # 32 tokens in 5 × 12 positions; five of them are the first of a row
    assert found == {"cls": (0, 60), "mean": (27, 60)}


def test_models_whose_last_layer_is_not_one_of_its_own_are_refused() -> None:
    with pytest.raises(byway.AdapterError, match="2 stacks"):
        maps_by_row(classifier("bart"))
    model, rows = classifier("albert"), examples()
    adapter = adapted(model)
    with pytest.raises(byway.AdapterError, match="several times"), last_layer(model):
        measured(model, adapter, pad_labelled(rows, 0), marks(rows, True, packed=False))


def test_how_many_layers_a_step_runs() -> None:
    model = classifier("bert")
    adapter = byway.attach(model, byway.LoRA(rank=2, layers=[1]))
    randomize(adapter.named_parameters())
    assert (layers_run(model, cached=False), layers_run(model, cached=True)) == (2, 1)
