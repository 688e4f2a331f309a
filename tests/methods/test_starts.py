"""OLoRA against the golden case and HF peft, EVA against HF peft and a plain decomposition of what goes into the maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import byway
from byway.errors import ConfigError, TargetError
from byway.methods.lora import LoRA
from byway.methods.lowrank.eva import Directions, redistribute, token_mask
from byway.methods.lowrank.sides import LowRank
from tests.methods.test_lora import GOLDEN, GRADIENT, close, linear, only, relative
from tests.tiny import VOCABULARY, build, inputs


def test_golden_olora_leaves_output_and_base_as_they_were() -> None:
    model, x = linear()
    before, y = model[0].weight.detach().clone(), model(x).detach()
    side = only(byway.attach(model, LoRA(rank=2, alpha=3, targets=["0"], init="olora")))
    product = (side.lora_B @ side.lora_A).detach()
    assert close(product, GOLDEN["olora_linear"]["BA"], GRADIENT)
    assert close(before - side.scale * product, GOLDEN["olora_linear"]["W_res"], GRADIENT)
    assert close(side.lora_B.T @ side.lora_B, torch.eye(2), 1e-6)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore")
def test_olora_starts_as_pefts_and_its_file_is_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    ours, x = build("llama"), inputs("llama")
    targets = ["q_proj", "down_proj"]
    adapter = byway.attach(ours, LoRA(rank=3, alpha=6, targets=targets, init="olora"))
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="olora"))
    state = theirs.state_dict()
    for site, side in adapter.side_paths():
        assert isinstance(side, LowRank)
        other = state[f"base_model.model.{site.path}.lora_B.default.weight"] @ state[f"base_model.model.{site.path}.lora_A.default.weight"]
        assert relative(side.lora_B @ side.lora_A, other) < 1e-5
        rest = side.product() + dict(ours.named_parameters())[f"{site.path}.weight"] - side.scale * other
        assert relative(rest, state[f"base_model.model.{site.path}.base_layer.weight"]) < 1e-5
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert close(loaded(**x).logits, ours(**x).logits, 1e-5)


def test_olora_decomposes_a_transposed_weight_the_right_way_round() -> None:
    model = build("gpt2")
    adapter = byway.attach(model, LoRA(rank=4, targets=["c_fc"], init="olora"))
    for site, side in adapter.side_paths():
        assert isinstance(side, LowRank)
        weight = site.module.get_parameter("weight").detach().T  # kept as (in, out)
        q, r = torch.linalg.qr(weight)
        assert relative(side.lora_B @ side.lora_A, q[:, :4] @ r[:4]) < 1e-5


# ---- EVA


def batches(count: int = 3, labels: bool = True) -> list[dict[str, Tensor]]:
    g, found = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (4, 11), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        marks = ids.clone()
        marks[:, :3] = -100
        marks[0, 8:] = -100
        found.append({"input_ids": ids, "attention_mask": mask} | ({"labels": marks} if labels else {}))
    return found


def rows_into(model: nn.Module, path: str, data: list[dict[str, Tensor]]) -> Tensor:
    """What goes into the module at `path`, tokens with a label only, in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return torch.cat([x[(b["labels"] != -100) & b["attention_mask"].bool()] for x, b in zip(seen, data, strict=True)]).double()


def projector(rows: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(rows.detach().double().T)
    return q @ q.T


def test_eva_starts_with_the_main_directions_of_the_labelled_tokens() -> None:
    model, data = build("llama"), batches()
    model.train()
    hooks = sum(len(mod._forward_pre_hooks) for mod in model.modules())
    before = build("llama")(**inputs("llama")).logits
    adapter = byway.attach(model, LoRA(rank=4, targets=["q_proj", "down_proj"], init="eva", rho=1.0), batches=data)
    assert all(module.training for path, module in model.named_modules() if ".byway" not in path)
    assert hooks == sum(len(mod._forward_pre_hooks) for mod in model.modules())
    for site, side in adapter.side_paths():
        assert isinstance(side, LowRank)
        rows = rows_into(build("llama"), site.path, data)
        expected = torch.linalg.svd(rows - rows.mean(0)).Vh[:4]
        assert relative(projector(side.lora_A), projector(expected)) < 1e-4
        assert close(side.lora_A @ side.lora_A.T, torch.eye(4), 1e-5)
        assert not bool(side.lora_B.any())
    assert torch.equal(model.eval()(**inputs("llama")).logits, before)


def steep() -> nn.Module:
    """A model whose inputs have clear main directions, so that peft's randomized decomposition finds them."""
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(0.6 ** torch.arange(32.0))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_the_subspaces_and_ranks_that_peft_finds(rho: float) -> None:
    data, targets = batches(1), ["q_proj", "v_proj", "down_proj"]
    eva = peft.EvaConfig(rho=rho, tau=0.99)
    theirs = peft.get_peft_model(steep(), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="eva", eva_config=eva))
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    adapter = byway.attach(steep(), LoRA(rank=4, alpha=8, targets=targets, init="eva", rho=rho), batches=data)
    own = {site.path: side for site, side in adapter.side_paths() if isinstance(side, LowRank)}
    found = {n.removeprefix("base_model.model.").split(".lora_A")[0]: p for n, p in theirs.named_parameters() if "lora_A" in n}
    assert sum(side.rank for side in own.values()) == sum(p.shape[0] for p in found.values()) == 4 * 9
    for layer in range(3):  # queries and values have the same inputs, so which of them wins a rank is a toss
        for group in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.down_proj",)):
            names = [f"model.layers.{layer}.{name}" for name in group]
            ours = sum(own[n].rank for n in names if n in own)
            assert abs(ours - sum(found[n].shape[0] for n in names if n in found)) <= (0 if rho == 1 else 1)
    compared = 0
    for path, side in own.items():
        assert side.scale == pytest.approx(2.0)
        if path in found and found[path].shape[0] == side.rank:
            rows = rows_into(steep(), path, data)
            rows = rows - rows.mean(0)
            ours, other = (float((rows @ projector(a)).norm() ** 2) for a in (side.lora_A, found[path]))
            assert ours * (1 + 1e-6) >= other > 0.98 * ours
            if path == "model.layers.0.self_attn.q_proj":
                assert relative(projector(side.lora_A), projector(found[path])) < 2e-2
            compared += 1
    assert compared > 3


@pytest.mark.filterwarnings("ignore")
def test_redistributed_ranks_are_in_the_method_and_in_the_file_with_the_scale_kept(tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    method = LoRA(rank=4, alpha=8, targets=["q_proj", "o_proj", "down_proj"], init="eva", rho=2.0)
    adapter = byway.attach(model, method, batches=batches())
    assert isinstance(adapter.method, LoRA) and adapter.method.rank_pattern
    ranks = [side.rank for _, side in adapter.side_paths() if isinstance(side, LowRank)]
    assert sum(ranks) == 36 and max(ranks) <= 8 and len(set(ranks)) > 1
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path)
    again = build("llama")
    back = byway.load(again, tmp_path)
    assert [side.rank for _, side in back.side_paths() if isinstance(side, LowRank)] == ranks
    assert torch.equal(again(**x).logits, model(**x).logits)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert close(loaded(**x).logits, model(**x).logits, 1e-5)


def test_eva_goes_with_dora_conv1d_and_other_families() -> None:
    for family in ("gpt2", "bert", "t5"):
        x = inputs(family)
        adapter = byway.attach(build(family), byway.DoRA(rank=3, init="eva"), batches=[{k: v for k, v in x.items() if k != "use_cache"}])
        assert all(side.rank > 0 for _, side in adapter.side_paths() if isinstance(side, LowRank))


def test_streamed_directions_equal_those_of_all_rows_at_once(seed: int) -> None:
    rows = torch.randn(200, 12) @ torch.randn(12, 12) + 3 * torch.randn(12)
    streamed = Directions(12)
    for part in rows.split([7, 50, 1, 92, 50]):
        streamed.add(part)
    centered = (rows - rows.mean(0)).double()
    _, values, vectors = torch.linalg.svd(centered, full_matrices=False)
    assert relative(streamed.values, values) < 1e-6
    assert relative(projector(streamed.vectors[:4]), projector(vectors[:4])) < 1e-5
    assert relative(streamed.ratios(), values.square() / values.square().sum()) < 1e-6


def test_ranks_go_where_one_direction_explains_most() -> None:
    found = {}
    for path, spread in (("flat", [1.0] * 6), ("steep", [10.0, 9.0, 8.0, 0.1, 0.1, 0.1])):
        found[path] = Directions(4)
        found[path].add(torch.cat([torch.diag(torch.tensor(spread)), -torch.diag(torch.tensor(spread))]))
    assert redistribute(found, {"flat": 2, "steep": 2}, {"flat": 4, "steep": 4}) == {"flat": 1, "steep": 3}
    assert redistribute(found, {"flat": 2, "steep": 2}, {"flat": 2, "steep": 2}) == {"flat": 2, "steep": 2}


def test_padding_and_unlabelled_tokens_are_left_out() -> None:
    (batch,) = batches(1)
    mask = token_mask(batch, labels=True)
    assert mask is not None and int(mask.sum()) == int((batch["labels"] != -100).sum())
    without = token_mask({k: v for k, v in batch.items() if k != "labels"}, labels=True)
    assert without is not None and int(without.sum()) == int(batch["attention_mask"].sum())


def test_what_eva_cannot_do_is_said() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="no calibration batches"):
        byway.attach(model, LoRA(init="eva"))
    few: list[Any] = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    with pytest.raises(ConfigError, match="3 tokens of the calibration batches"):
        byway.attach(model, LoRA(rank=4, init="eva"), batches=few)
    with pytest.raises(TargetError, match="linear maps only"):
        byway.attach(model, LoRA(rank=4, targets=["embed_tokens"], init="eva"), batches=batches())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="init: eva do not go together"):
        LoRA(blocks=(True, False, True), init="eva")
    with pytest.raises(ConfigError, match="kaiming, gaussian, pissa, pissa_fast, olora or eva"):
        LoRA(init="xavier")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 1)], ids=["linear", "convolution"])
def test_a_bias_of_the_branch_acts_and_is_merged_whatever_the_start(make: Any, init: str, seed: int) -> None:
    torch.manual_seed(seed)
    module = make()
    init = "kaiming" if isinstance(module, nn.Conv1d) else init
    model = nn.Sequential(module)
    adapter = byway.attach(model, byway.LoRA(rank=2, targets=["0"], init=init, lora_bias=True))
    (_, side), *_ = adapter.side_paths()
    x = torch.randn(3, 6) if isinstance(module, nn.Linear) else torch.randn(3, 6, 4)
    with torch.no_grad():
        before = model(x)
        side.lora_bias.fill_(0.5)  # type: ignore[union-attr]
        moved = model(x)
        torch.testing.assert_close(moved, before + side.scale * 0.5, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    model(x).sum().backward()
    assert side.lora_bias.grad.abs().min() > 0  # type: ignore[union-attr]
    byway.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), moved, rtol=1e-4, atol=1e-5)


def test_blocks_take_no_bias_of_the_branch() -> None:
    with pytest.raises(byway.ConfigError, match="blocks and lora_bias do not go together"):
        byway.LoRA(blocks=(True, False, True), lora_bias=True)
