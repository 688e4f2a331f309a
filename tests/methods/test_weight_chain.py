"""Chains of weight transforms against the golden DoRA, torch's own parametrizations, and DoRA beside the same base."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import byway
from byway.errors import AdapterError, ConfigError, TargetError
from byway.methods.lowrank.chain import Chain, LowRankLink, MagnitudeLink
from byway.methods.weight_chain import WeightChain
from tests.methods.test_dora import grown
from tests.methods.test_lora import FORWARD, GOLDEN, GRADIENT, close, linear, m, relative
from tests.tiny import build, inputs, randomize

LOW_RANK = {"name": "low_rank", "rank": 2, "alpha": 3}
OWN = "tests.methods.links:Columns"


def only(adapter: byway.Adapter) -> Chain:
    ((_, side),) = adapter.side_paths()
    assert isinstance(side, Chain)
    return side


def golden(links: tuple[Any, ...]) -> tuple[nn.Module, Chain, Tensor]:
    model, x = linear()
    side = only(byway.attach(model, WeightChain(links=links, targets=["0"])))
    for link in side.links:
        if isinstance(link, LowRankLink):
            link.lora_A.data.copy_(m(GOLDEN["inputs"]["A"]))
            link.lora_B.data.copy_(m(GOLDEN["inputs"]["B"]))
        elif isinstance(link, MagnitudeLink):
            assert close(link.magnitude.detach(), GOLDEN["dora_linear"]["magnitude_init"], FORWARD)
            link.magnitude.data.mul_(torch.tensor([1.1, 0.9, 1.0, 1.2]))
    return model, side, x


def test_low_rank_then_magnitude_is_the_golden_dora_with_its_gradients_and_merge() -> None:
    case = GOLDEN["dora_linear"]
    model, side, x = golden((LOW_RANK, "magnitude"))
    y = model(x)
    assert close(y, case["y"], FORWARD)
    (0.5 * y.pow(2).sum()).backward()
    own = dict(side.named_parameters())
    for name, gold in (("links.1.magnitude", "dm"), ("links.0.lora_A", "dA"), ("links.0.lora_B", "dB")):
        assert close(grown(own[name].grad), case["norm_detached"][gold], GRADIENT)
    byway.merge(model)
    assert close(model[0].weight, case["W_eff"], FORWARD)


def test_the_other_way_round_it_is_another_function() -> None:
    model, _, x = golden(("magnitude", LOW_RANK))
    difference = float((model(x).detach() - torch.tensor(GOLDEN["dora_linear"]["y"])).abs().max())
    ratio = torch.tensor([1.1, 0.9, 1.0, 1.2])[:, None]
    weight = ratio * m(GOLDEN["inputs"]["W"]) + 1.5 * m(GOLDEN["inputs"]["B"]) @ m(GOLDEN["inputs"]["A"])
    assert difference == pytest.approx(0.139, abs=1e-3)
    assert close(model(x), x @ weight.T + torch.tensor(GOLDEN["inputs"]["bias"]), FORWARD)


def test_several_low_rank_terms_add_up_and_the_order_of_those_does_not_matter() -> None:
    links = ({"name": "low_rank", "rank": 1}, {"name": "low_rank", "rank": 3, "alpha": 2.0})
    model, x = linear()
    before = model[0].weight.detach().clone()
    side = only(byway.attach(model, WeightChain(links=links, targets=["0"])))
    randomize(side.named_parameters(), scale=0.4)
    total = sum((link.scale * link.lora_B @ link.lora_A for link in side.links if isinstance(link, LowRankLink)), torch.zeros(4, 6))
    assert relative(model(x), x @ (before + total).T + model[0].bias) < 1e-6
    assert sum(p.numel() for p in side.parameters()) == (1 + 3) * (6 + 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(12, 8), torch.randn(5, 12)),
        lambda: (nn.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 9)),
        lambda: (nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=1, padding_mode="reflect"), torch.randn(2, 4, 9, 9)),
        lambda: (nn.Conv3d(3, 6, 2), torch.randn(2, 3, 4, 4, 4)),
        lambda: (nn.Embedding(11, 8), torch.randint(0, 11, (4, 5))),
    ],
    ids=["linear", "conv1d", "grouped conv2d", "conv3d", "embedding"],
)
def test_output_gradients_and_merge_equal_torchs_parametrizations(make: Any) -> None:
    torch.manual_seed(3)
    module, x = make()
    ours, theirs = nn.Sequential(module), nn.Sequential(pickle.loads(pickle.dumps(module)))
    before = ours(x).detach()
    method = WeightChain(links=({"name": "low_rank", "rank": 2}, "magnitude", OWN), targets=["0"])
    side = only(byway.attach(ours, method))
    assert relative(ours(x), before) < 1e-6
    randomize(side.named_parameters(), scale=0.3)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.links = pickle.loads(pickle.dumps(side.links))

        def forward(self, weight: Tensor) -> Tensor:
            matrix = weight.T if isinstance(module, nn.Embedding) else weight.flatten(1)
            for link in self.links:
                matrix = link(matrix)
            return matrix.T if isinstance(module, nn.Embedding) else matrix.reshape(weight.shape)

    parametrize.register_parametrization(theirs[0], "weight", Whole())
    y, expected = ours(x), theirs(x)
    assert relative(y, expected) < 1e-5
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    other = dict(theirs[0].parametrizations["weight"][0].links.named_parameters())
    for name, parameter in side.links.named_parameters():
        assert relative(grown(parameter.grad), grown(other[name].grad)) < 1e-4, name
    byway.merge(ours)
    assert relative(ours(x), expected) < 1e-5


def test_beside_a_model_it_equals_dora_and_a_bfloat16_base_does_not_round_small_changes_away() -> None:
    x = inputs("gpt2")
    chained, decomposed = build("gpt2"), build("gpt2")
    one = byway.attach(chained, WeightChain(links=({"name": "low_rank", "rank": 4}, "magnitude"), targets=["c_attn"]))
    two = byway.attach(decomposed, byway.DoRA(rank=4, targets=["c_attn"]))
    names = {"lora_A": "links.0.lora_A", "lora_B": "links.0.lora_B", "magnitude": "links.1.magnitude"}
    with torch.no_grad():
        for (_, a), (_, b) in zip(one.side_paths(), two.side_paths(), strict=True):
            for theirs, ours in names.items():
                b.get_parameter(theirs).add_(0.1 * torch.randn_like(b.get_parameter(theirs)))
                a.get_parameter(ours).copy_(b.get_parameter(theirs))
    assert relative(chained(**x).logits, decomposed(**x).logits) < 1e-5
    layer = nn.Sequential(nn.Linear(32, 32, bias=False, dtype=torch.bfloat16))
    side = only(byway.attach(layer, WeightChain(links=("magnitude",), targets=["0"])))
    with torch.no_grad():
        side.get_parameter("links.0.magnitude").mul_(1.0005)  # an eighth of what a bfloat16 weight can change by
    assert relative(side.change(), 0.0005 * layer[0].weight.float()) < 1e-3


def test_ones_own_links_train_save_and_load_and_no_file_makes_us_import_anything(tmp_path: Path) -> None:
    method = WeightChain(links=[LOW_RANK, {"name": OWN, "start": 0.5}], targets=["q_proj"])
    assert hash(method) == hash(WeightChain(links=(LOW_RANK, {"name": OWN, "start": 0.5}), targets=("q_proj",)))
    assert pickle.loads(pickle.dumps(method)) == method
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, method)
    assert adapter.side_paths()[0][1].get_parameter("links.1.gain")[0].item() == 0.5
    randomize(adapter.named_parameters())
    adapter.save(tmp_path / "a")
    again = build("llama")
    assert byway.load(again, tmp_path / "a").method == method
    assert torch.equal(again(**x).logits, model(**x).logits)
    script = """
import sys
import byway
from tests.tiny import build
try:
    byway.load(build("llama"), sys.argv[1])
except byway.AdapterError as error:
    print(error)
print("tests.methods.links" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], cwd=root, capture_output=True, text=True, check=True)
    assert "no code is imported because a file names it" in done.stdout
    assert done.stdout.strip().endswith("False")
    config = json.loads((tmp_path / "a" / "byway_adapter.json").read_text())
    config["fields"]["links"][1] = {"name": "subprocess:Popen", "args": "true"}
    (tmp_path / "a" / "byway_adapter.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"subprocess has no nn\.Module"):
        byway.load(build("llama"), tmp_path / "a")


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ((), r"links is \[\]; it must be a non-empty list"),
        (("low_rnk",), "no link 'low_rnk'.*low_rank"),
        (({"name": "low_rank", "rank": 0},), r"links\[0\]: rank is 0; it must be an integer from 1"),
        (({"name": "low_rank", "ranks": 2},), "no option 'ranks'"),
        (({"rank": 2},), "has no name"),
        (("low_rank", 3), "links\\[1\\] is 3"),
        ("low_rank", "must be a non-empty list"),
    ],
)
def test_wrong_links_are_named(links: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WeightChain(links=links)


@pytest.mark.parametrize(
    ("link", "error", "says"),
    [
        ("no_such_module_here:Link", ConfigError, "cannot import"),
        ("tests.methods.links:Colums", ConfigError, "Columns"),
        ("tests.methods.links:a_function", ConfigError, "no nn.Module"),
        ("tests.methods.links:Flat", TargetError, r"link 0 \(Flat\) at 0 turns a matrix of shape \[4, 6\] into shape \[24\]"),
        ({"name": "low_rank", "rank": 5}, TargetError, "rank 5 is more than 0 can use"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_model_untouched(link: Any, error: type[Exception], says: str) -> None:
    model, _ = linear()
    with pytest.raises(error, match=says):
        byway.attach(model, WeightChain(links=(link,), targets=["0"]))
    assert all(p.requires_grad for p in model.parameters())
