"""Our loralib against the installed one: initialization, outputs, gradients, merges, state dicts, checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import loralib as theirs
import pytest
import torch
import transformers
from torch import nn

import byway
import byway.compat.loralib as lora
from byway.methods.lowrank.sides import BlockLoRA, LinearLoRA

CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("Linear", (6, 4), {"r": 2, "lora_alpha": 3}),
    ("Linear", (6, 4), {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "bias": False}),
    ("Linear", (6, 4), {}),
    ("MergedLinear", (6, 12), {"r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]}),
    ("MergedLinear", (6, 12), {"r": 2, "lora_alpha": 3, "enable_lora": [False, True], "fan_in_fan_out": True}),
    ("Embedding", (7, 4), {"r": 2, "lora_alpha": 3, "padding_idx": 1}),
    ("Conv2d", (4, 6, 3), {"r": 2, "lora_alpha": 3, "padding": 1}),
    ("Conv2d", (4, 6, 3), {"r": 2, "lora_alpha": 3, "groups": 2, "stride": 2}),
]


def example(kind: str) -> torch.Tensor:
    if kind == "Embedding":
        return torch.randint(0, 7, (3, 5))
    return torch.randn(2, 4, 7, 7) if kind.startswith("Conv") else torch.randn(3, 6)


@pytest.mark.parametrize(("kind", "sizes", "options"), CASES)
def test_layers_start_compute_learn_and_merge_as_loralibs_and_take_the_update_out_exactly(
    kind: str, sizes: tuple[int, ...], options: dict[str, Any], seed: int
) -> None:
    layers = []
    for library in (theirs, lora):
        torch.manual_seed(seed)
        layers.append(getattr(library, kind)(*sizes, **options))
    a, b = layers
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    with torch.no_grad():
        for p in a.parameters():
            p.normal_()
    b.load_state_dict(a.state_dict())
    x = example(kind)
    torch.testing.assert_close(b(x), a(x), atol=1e-5, rtol=1e-5)
    a(x).pow(2).sum().backward()
    b(x).pow(2).sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-5)
    before, out = {k: v.clone() for k, v in b.state_dict().items()}, b(x).detach()
    wide = copy.deepcopy(a).double()
    for layer in (a, b, wide):
        layer.eval()
    assert list(a.state_dict()) == list(b.state_dict())
    for k, merged in wide.state_dict().items():  # CPUs sum the products in other orders, so that the last bit may differ from loralib's
        if merged.equal(before[k].double()):
            assert torch.equal(b.state_dict()[k], before[k])
        for found in (a.state_dict()[k], b.state_dict()[k]):
            torch.testing.assert_close(found.double(), merged, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(b(x), out, atol=1e-4, rtol=1e-5)
    b.train()
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    a.load_state_dict(b.state_dict())


@pytest.mark.parametrize(("kind", "shape"), [("Conv1d", (7,)), ("Conv3d", (5, 5, 5))])
def test_convolutions_of_one_and_three_dimensions_work_here(kind: str, shape: tuple[int, ...], seed: int) -> None:
    layer = getattr(lora, kind)(4, 6, 3, r=2, lora_alpha=4, groups=2)
    assert torch.equal(layer.delta(), torch.zeros_like(layer.conv.weight))
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(2, 4, *shape)
    out = layer(x)
    delta = 4 / 2 * (layer.lora_B.double() @ layer.lora_A.double()).reshape(layer.conv.weight.shape)
    reference = layer.conv._conv_forward(x.double(), layer.conv.weight.double() + delta, layer.conv.bias.double())
    torch.testing.assert_close(out.double(), reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.eval()(x), out, atol=1e-5, rtol=1e-5)


def test_a_hundred_rounds_of_training_and_evaluation_in_bfloat16_leave_the_weight_as_it_was() -> None:
    drifted, kept = (library.Linear(32, 32, r=4).to(torch.bfloat16) for library in (theirs, lora))
    for layer in (drifted, kept):
        start = layer.weight.detach().clone()
        for _ in range(100):
            layer.train()
            with torch.no_grad():
                layer.lora_B.normal_()
            layer.eval()
        layer.train()
        assert torch.equal(layer.weight, start) == (layer is kept)


def test_factors_loaded_while_merged_act_and_a_weight_is_refused() -> None:
    layer, other = lora.Linear(6, 4, r=2), lora.Linear(6, 4, r=2)
    with torch.no_grad():
        other.lora_B.normal_()
    weight, x = layer.weight.detach().clone(), torch.randn(3, 6)
    layer.eval()
    layer.load_state_dict(lora.lora_state_dict(other), strict=False)
    torch.testing.assert_close(layer(x), x @ (weight + other.delta()).T + layer.bias)
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.train().weight, weight)


class Net(nn.Module):
    def __init__(self, library: Any) -> None:
        super().__init__()
        self.embed = library.Embedding(9, 6, r=2)
        self.qkv = library.MergedLinear(6, 18, r=2, enable_lora=[True, False, True])
        self.norm = nn.LayerNorm(18)
        self.out = library.Linear(18, 3, r=2, lora_dropout=0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.qkv(self.embed(ids))))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_readmes_flow_trains_saves_and_loads_what_loralib_does(bias: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = Net(theirs)
    theirs.mark_only_lora_as_trainable(reference, bias=bias)
    torch.manual_seed(0)
    model = Net(lora)
    lora.mark_only_lora_as_trainable(model, bias=bias)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, p in reference.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(0, 9, (4, 5))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).pow(2).mean().backward()
        optimizer.step()
    saved = lora.lora_state_dict(model, bias=bias)
    reference.load_state_dict(model.state_dict())
    assert saved.keys() == theirs.lora_state_dict(reference, bias=bias).keys()
    torch.save(saved, tmp_path / "lora.pt")
    torch.manual_seed(0)
    fresh = Net(lora)  # the pretrained weights: the same start
    fresh.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert torch.equal(fresh.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora.MergedLinear(6, 10, r=2, enable_lora=[True, False, True]),
        lambda: lora.Linear(6, 4, r=-1),
        lambda: lora.Conv2d(3, 4, (3, 3), r=2),  # pyright: ignore[reportArgumentType]
        lambda: lora.lora_state_dict(nn.Linear(2, 2), bias="some"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_does_not_fit_is_named(make: Any) -> None:
    with pytest.raises(byway.ConfigError, match=r"enable_lora|r is -1|kernel_size|bias is"):
        make()


# ---- checkpoints


def roberta(layers: int = 12, **sizes: Any) -> transformers.RobertaForSequenceClassification:
    torch.manual_seed(1)
    config = transformers.RobertaConfig(vocab_size=60, max_position_embeddings=40, num_labels=3, num_hidden_layers=layers, **sizes)
    return transformers.RobertaForSequenceClassification(config).eval()


def test_microsofts_mnli_checkpoint_lands_whole_and_computes_its_formula(data_dir: Path, tmp_path: Path) -> None:
    file = data_dir / "loralib-mnli" / "roberta_base_lora_mnli.bin"
    model = roberta()
    adapter = byway.load_loralib(model, file, alpha=16)
    held = torch.load(file, map_location="cpu", weights_only=True)
    assert adapter.num_parameters == sum(t.numel() for t in held.values())
    assert not any(p.requires_grad for _, p in adapter.named_parameters())
    path = "roberta.encoder.layer.7.attention.self.value"
    a, b = (held[f"{path}.lora_{f}"].double() for f in "AB")
    module, x = model.get_submodule(path), torch.randn(5, 768)
    reference = x.double() @ (module.weight.double() + 16 / 8 * b @ a).T + module.bias.double()
    assert (module(x) - reference).abs().max() < 1e-5
    hidden = torch.randn(2, 4, 768)
    own = {k.removeprefix("classifier."): v for k, v in held.items() if k.startswith("classifier.")}
    expected = torch.tanh(hidden[:, 0] @ own["dense.weight"].T + own["dense.bias"]) @ own["out_proj.weight"].T + own["out_proj.bias"]
    assert torch.allclose(model.classifier(hidden), expected, atol=1e-5)
    adapter.save(tmp_path / "a")
    again = roberta()
    byway.load(again, tmp_path / "a")
    ids = torch.randint(3, 60, (2, 7))
    assert torch.equal(again(ids).logits, model(ids).logits)


def small(**kwargs: Any) -> transformers.RobertaForSequenceClassification:
    return roberta(2, hidden_size=32, num_attention_heads=4, intermediate_size=48, **kwargs)


def checkpoint(path: Path, **changes: Any) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {
        f"roberta.encoder.layer.{i}.attention.self.query.lora_{f}": torch.randn(shape, generator=g)
        for i in range(2)
        for f, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    torch.save(tensors, path)
    return path


QUERY = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"{QUERY}.lora_B": None}, "only one of"),
        ({f"{QUERY}.lora_A": torch.zeros(4, 31)}, "do not fit"),
        ({f"{QUERY}.lora_A": torch.full((4, 32), float("nan"))}, "NaN"),
        ({"roberta.encoder.layer.9.attention.self.query.lora_A": torch.zeros(4, 32)}, "only one of"),
        ({"surprise": torch.zeros(2)}, "do not belong"),
        ({"step": 3}, "more than tensors"),
        ({"roberta.encoder.layer.0.output.dense.weight": torch.zeros(32, 48)}, "another base"),
        ({"classifier.dense.weight": torch.zeros(32, 32)}, "missing"),
    ],
)
def test_a_tensor_without_a_place_or_missing_is_refused_with_the_model_untouched(changes: Any, says: str, tmp_path: Path) -> None:
    model = small()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(byway.AdapterError, match=says):
        byway.load_loralib(model, checkpoint(tmp_path / "c.pt", **changes), alpha=8)
    assert [p.requires_grad for p in model.parameters()] == flags and byway.adapters(model) == {}


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/byway-must-not-exist"),)


def test_a_pickle_that_holds_more_than_tensors_is_never_run(tmp_path: Path) -> None:
    for write in (lambda f: torch.save({"a.lora_A": Evil()}, f), lambda f: pickle.dump({"a.lora_A": Evil()}, f)):
        with (tmp_path / "evil.pt").open("wb") as f:
            write(f)
        with pytest.raises(byway.AdapterError, match="cannot be read as tensors alone"):
            byway.load_loralib(small(), tmp_path / "evil.pt", alpha=8)
    assert not Path("/tmp/byway-must-not-exist").exists()


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True)])
def test_a_fused_map_and_trained_biases_equal_loralibs(enabled: tuple[bool, ...], tmp_path: Path, seed: int) -> None:
    class Block(nn.Module):
        def __init__(self, kind: Any, **options: Any) -> None:
            super().__init__()
            self.qkv = kind(8, 24, **options)
            self.norm = nn.LayerNorm(24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.qkv(x))

    trained = Block(theirs.MergedLinear, r=2, lora_alpha=6, enable_lora=list(enabled))
    base = Block(nn.Linear)
    base.load_state_dict({k: v for k, v in trained.state_dict().items() if "lora_" not in k})
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if "lora_" in name or "bias" in name:
                p.normal_()
    torch.save({f"module.{k}": v for k, v in theirs.lora_state_dict(trained, bias="all").items()}, tmp_path / "c.pt")
    if not all(enabled):
        with pytest.raises(byway.AdapterError, match="does not say which"):
            byway.load_loralib(base, tmp_path / "c.pt", alpha=6)
    adapter = byway.load_loralib(base, tmp_path / "c.pt", alpha=6, blocks=None if all(enabled) else enabled)
    assert {type(side) for _, side in adapter.side_paths()} >= {BlockLoRA} and LinearLoRA not in {type(s) for _, s in adapter.side_paths()}
    x = torch.randn(3, 8)
    torch.testing.assert_close(base(x), trained(x), atol=1e-5, rtol=1e-5)
