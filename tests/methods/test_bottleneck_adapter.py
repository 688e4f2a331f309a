"""Bottleneck adapters against numbers nobody here wrote: golden cases, the papers' formulas in float64, counts of the paper from shapes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import byway
from byway.core.adapter import Adapter
from byway.core.slots import SidePath
from byway.methods.bottleneck.sides import Bottleneck, OnOutput, Shape, TrainedNorm
from tests import zoo
from tests.tiny import build, inputs, randomize

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())
FORWARD = 2e-6  # the golden file's tolerance
RELATIVE = 1e-6  # float32 against an independent formula, reliability I5


def m(spec: str) -> Tensor:
    """``M(a,b,p,q,m,c)`` of the golden file: ((i·p + j·q) mod m − c) / 10."""
    a, b, p, q, mod, c = (int(x) for x in spec[2 : spec.index(")")].split(","))
    return torch.tensor([[(((i * p + j * q) % mod) - c) / 10 for j in range(b)] for i in range(a)])


def golden_side(activation: str, scaling: float = 1.0) -> tuple[OnOutput, Tensor]:
    case = GOLDEN["bottleneck"]
    side = OnOutput(Shape(width=6, size=2, activation=activation, scaling=scaling), torch.Generator())
    with torch.no_grad():
        side.down.weight.copy_(m(case["W_down"]))
        side.down.bias.copy_(torch.tensor(case["b_down"]))
        side.up.weight.copy_(m(case["W_up"]))
        side.up.bias.fill_(0.05)
    return side, m(case["h"])


@pytest.mark.parametrize(
    ("activation", "key"),
    [("relu", "relu"), ("gelu", "gelu_exact"), ("gelu_tanh", "gelu_tanh"), ("silu", "silu"), ("swish", "silu")],
)
def test_golden_residual_branch(activation: str, key: str) -> None:
    side, h = golden_side(activation)
    expected = torch.tensor(GOLDEN["bottleneck"][f"residual_{key}"])
    assert (side.after({"x": h}, h) - expected).abs().max() <= FORWARD


def test_golden_parallel_branch() -> None:
    side, h = golden_side("relu", 4.0)
    assert (side.branch(h) - torch.tensor(GOLDEN["bottleneck"]["parallel_branch_relu_scale4"])).abs().max() <= FORWARD


# ---- the formulas on a whole model, written out once more


def f(side: Bottleneck, h: Tensor, sigma: Any) -> Tensor:
    p = {name: tensor.double() for name, tensor in side.named_parameters()}
    return sigma(h @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]


def ln(norm: nn.LayerNorm, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled * (norm.weight if weight is None else weight) + (norm.bias if bias is None else bias)


def sides(adapter: Adapter) -> dict[str, list[SidePath]]:
    found: dict[str, list[SidePath]] = {}
    for site, side in adapter.side_paths():
        found.setdefault(site.path, []).append(side)
    return found


def bert_by_hand(model: Any, adapter: Adapter, ids: Tensor, variant: str, sigma: Any) -> Tensor:
    """BertForSequenceClassification with adapters, in float64, from the equations; no hook takes part."""
    installed = sides(adapter)
    bert = model.bert

    def norm(path: str, x: Tensor) -> Tensor:
        own = [s for s in installed.get(path, []) if isinstance(s, TrainedNorm)]
        module = model.get_submodule(path)
        return ln(module, x, *(p.double() for _, p in own[0].named_parameters())) if own else ln(module, x)

    def bottleneck(path: str) -> Bottleneck | None:
        return next((s for s in installed.get(path, []) if isinstance(s, Bottleneck)), None)

    e = bert.embeddings
    t = ids.shape[1]
    x = e.word_embeddings.weight[ids] + e.position_embeddings.weight[:t] + e.token_type_embeddings.weight[0]
    x = norm("bert.embeddings.LayerNorm", x)
    for i, layer in enumerate(bert.encoder.layer):
        at = f"bert.encoder.layer.{i}"
        a = layer.attention.self
        q, k, v = (w(x).unflatten(-1, (4, 8)).transpose(1, 2) for w in (a.query, a.key, a.value))
        z = layer.attention.output.dense((torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2))
        side = bottleneck(f"{at}.attention.output.dropout")
        if variant == "houlsby" and side is not None:
            z = z + f(side, z, sigma)
        x = norm(f"{at}.attention.output.LayerNorm", x + z)
        z = layer.output.dense(F.gelu(layer.intermediate.dense(x)))
        side = bottleneck(f"{at}.output.dropout" if variant == "houlsby" else f"{at}.output.LayerNorm")
        assert side is not None
        z = z + f(side, z if variant == "houlsby" else norm(f"{at}.output.LayerNorm", x + z), sigma)
        x = norm(f"{at}.output.LayerNorm", x + z)
    head = next(side for side in installed["classifier"])
    w, b = (p.double() for _, p in head.named_parameters())
    return torch.tanh(bert.pooler.dense(x[:, 0])) @ w.T + b


@pytest.mark.parametrize(
    ("variant", "activation", "norms", "sigma"),
    [
        ("houlsby", None, None, F.gelu),
        ("pfeiffer", None, None, F.relu),
        ("pfeiffer", "silu", True, F.silu),
        ("houlsby", "tanh", False, torch.tanh),
    ],
)
def test_bert_follows_the_papers_formula_in_outputs_and_gradients(
    variant: Any, activation: Any, norms: bool | None, sigma: Any, seed: int
) -> None:
    model, x = build("bert", seed), inputs("bert", seed)
    adapter = byway.attach(model, byway.BottleneckAdapter(variant=variant, reduction=4, activation=activation, norms=norms))
    randomize(adapter.named_parameters(), seed, scale=0.3)
    twin = copy.deepcopy(model).double()
    model(**x).logits.pow(2).sum().backward()
    theirs = byway.adapters(twin)["default"]
    expected = bert_by_hand(twin, theirs, x["input_ids"], variant, sigma)
    assert (model(**x).logits.double() - expected).norm() / expected.norm() < RELATIVE
    expected.pow(2).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in adapter.named_parameters():
        reference = wanted[name].grad
        assert parameter.grad is not None
        assert reference is not None
        assert (parameter.grad.double() - reference).norm() <= 1e-5 * reference.norm(), name


def llama_by_hand(model: Any, adapter: Adapter, ids: Tensor) -> Tensor:
    """LlamaForCausalLM with Pfeiffer adapters after both sub-layers: z + f(x + z), in the model's own modules but without hooks."""
    installed = sides(adapter)

    def rms(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    trunk = model.model
    x = trunk.embed_tokens.weight[ids]
    t = ids.shape[1]
    positions = trunk.rotary_emb(x, torch.arange(t)[None])
    mask = torch.full((t, t), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    for i, layer in enumerate(trunk.layers):
        forward = type(layer.self_attn).forward
        z, _ = forward(layer.self_attn, rms(layer.input_layernorm, x), position_embeddings=positions, attention_mask=mask)
        x = x + z + f(_only(installed[f"model.layers.{i}.self_attn"]), x + z, F.relu)
        h = rms(layer.post_attention_layernorm, x)
        z = (F.silu(h @ layer.mlp.gate_proj.weight.T) * (h @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
        x = x + z + f(_only(installed[f"model.layers.{i}.mlp"]), x + z, F.relu)
    return rms(trunk.norm, x) @ model.lm_head.weight.T


def _only(installed: list[SidePath]) -> Bottleneck:
    return next(side for side in installed if isinstance(side, Bottleneck))


def test_pfeiffer_in_a_prenorm_decoder_reads_the_sum_with_the_residual(seed: int) -> None:
    model, x = build("llama", seed).double(), inputs("llama", seed)
    method = byway.BottleneckAdapter(variant="pfeiffer", reduction=4, places=["attention", "feed-forward"])
    adapter = byway.attach(model, method)
    randomize(adapter.named_parameters(), seed, scale=0.3)
    expected = llama_by_hand(model, adapter, x["input_ids"])
    assert (model(**x).logits - expected).norm() / expected.norm() < RELATIVE  # the model's own norm computes in float32


# ---- how many numbers


def test_counts_of_a_tiny_layer() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8
    )
    for method, expected in (
        (byway.BottleneckAdapter(variant="pfeiffer", reduction=4), 148),
        (byway.BottleneckAdapter(reduction=4, norms=False), 296),
        (byway.BottleneckAdapter(reduction=4), 296 + 3 * 32),
    ):
        assert byway.attach(BertModel(config), method).num_parameters == expected


def test_counts_of_bert_large_from_shapes_alone() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(
            BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), add_pooling_layer=False
        )
    adapter = byway.attach(model, byway.BottleneckAdapter(size=64))
    norms = sum(p.numel() for _, side in adapter.side_paths() if isinstance(side, TrainedNorm) for p in side.parameters())
    assert (adapter.num_parameters - norms, norms) == (6_343_680, 100_352)


# ---- norms, other dtypes, cross-attention, starts


@pytest.mark.parametrize("name", ["gemma", "t5", "llama", "bert", "cohere", "nemotron"])
def test_a_trained_norm_equals_the_norm_with_those_weights(name: str, seed: int) -> None:
    model = zoo.build(name)
    frozen = copy.deepcopy(model)
    adapter = byway.attach(model, byway.BottleneckAdapter(modules_to_save="none"))
    with torch.no_grad():
        for site, side in adapter.side_paths():
            if isinstance(side, TrainedNorm):
                for key, parameter in side.named_parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
                    frozen.get_submodule(site.path).get_parameter(key).copy_(parameter)
        x = zoo.inputs(model)
        expected, found = frozen(**x)[0], model(**x)[0]
    assert (found - expected).norm() / expected.norm() < 5e-6


def test_a_half_precision_base_keeps_its_output_at_attach_and_its_dtype() -> None:
    for family in ("bert", "llama"):
        model, x = build(family).to(torch.bfloat16).requires_grad_(False), inputs(family)
        before = model(**x).logits
        adapter = byway.attach(model, byway.BottleneckAdapter(modules_to_save="none"))
        assert torch.equal(model(**x).logits, before)
        assert {p.dtype for _, p in adapter.named_parameters()} == {torch.float32}
        randomize(adapter.named_parameters())
        assert model(**x).logits.dtype == torch.bfloat16


def test_cross_attention_has_an_adapter_only_when_it_is_named() -> None:
    usual = byway.attach(build("t5"), byway.BottleneckAdapter(norms=False))
    assert not [site.path for site, _ in usual.side_paths() if "decoder" in site.path and ".layer.1." in site.path]
    named = byway.attach(build("t5"), byway.BottleneckAdapter(norms=False, places=["cross-attention"]))
    assert [site.path for site, _ in named.side_paths()] == [f"decoder.block.{i}.layer.1.dropout" for i in range(3)]


def test_starts_are_as_published(seed: int) -> None:
    shape = {"width": 400, "size": 100, "activation": "relu"}
    for init, deviation, largest in (("houlsby", 0.88e-3, 2e-3), ("bert", 0.02, 0.2)):
        side = OnOutput(Shape(**shape, init=init), torch.Generator().manual_seed(seed))
        for weight in (side.down.weight, side.up.weight):
            assert weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert weight.abs().max() <= largest
        assert not side.down.bias.any()
        assert not side.up.bias.any()
    side = OnOutput(Shape(**shape), torch.Generator().manual_seed(seed))
    assert not side.up.weight.any()
    assert side.down.weight.abs().max() <= 1 / 20


def test_lora_before_or_after_gives_the_same_function() -> None:
    """The adapter reads the whole sub-layer's output, so that a LoRA inside is part of it whenever it was attached."""
    x = inputs("llama")
    found = []
    for order in ((0, 1), (1, 0)):
        model = build("llama")
        methods = (byway.LoRA(targets=["o_proj", "down_proj"]), byway.BottleneckAdapter(norms=False))
        for i in order:
            byway.attach(model, methods[i], name=("lora", "adapter")[i])
        for name in ("lora", "adapter"):
            randomize(byway.adapters(model)[name].named_parameters())
        found.append(model(**x).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "houslby"}, "variant"),
        ({"reduction": 0}, "reduction"),
        ({"size": 0}, "size"),
        ({"activation": "rel"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
        ({"scaling": "learnt"}, "scaling"),
        ({"scaling": 0}, "scaling is 0"),
        ({"places": []}, "places"),
        ({"places": ["attention", "mlp"]}, r"places\[1\] is 'mlp'"),
        ({"places": ["attention", "attention"]}, "list each once"),
        ({"layer_norm": "before"}, "layer_norm"),
        ({"init": "xavier"}, "init"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(byway.ConfigError, match=says):
        byway.BottleneckAdapter(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"places": ["cross-attention"]}, "cross-attention"),
        ({"layers": [7]}, "out of range"),
        ({"exclude": ["output.dropuot"]}, "did you mean 'output.dropout'|matches no module"),
    ],
)
def test_what_is_not_in_the_model_is_refused_before_it_is_touched(fields: dict[str, Any], says: str) -> None:
    model = build("bert")
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(byway.TargetError, match=says):
        byway.attach(model, byway.BottleneckAdapter(**fields))
    assert [p.requires_grad for p in model.parameters()] == before


def test_plain_torch_is_refused_with_what_to_do() -> None:
    with pytest.raises(byway.TargetError, match="cannot be told"):
        byway.attach(nn.Sequential(nn.Linear(3, 3)), byway.BottleneckAdapter())


def test_layers_leaves_norms_outside_them_frozen() -> None:
    adapter = byway.attach(build("llama"), byway.BottleneckAdapter(layers="2-"))
    assert {site.path.split(".layers.")[1][0] for site, _ in adapter.side_paths()} == {"2"}
