"""AdaLoRA against the golden case, the golden schedule, and HF peft's AdaLoraModel over whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import byway
from byway.core.slots import penalties
from byway.errors import AdapterError, ConfigError, TargetError
from byway.methods.adalora import AdaLoRA
from byway.methods.lowrank.adaptive import AdaptiveRank, Schedule
from tests.methods.test_lora import FORWARD, GOLDEN, close, m, relative
from tests.tiny import build, inputs, randomize


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def sides(adapter: byway.Adapter) -> list[AdaptiveRank]:
    return [side for _, side in adapter.side_paths() if isinstance(side, AdaptiveRank)]


def golden() -> tuple[nn.Module, byway.Adapter, Tensor]:
    model = Sum()
    method = AdaLoRA(rank=1, initial_rank=2, alpha=4, targets=["a", "b"], initial_steps=0, final_steps=2)
    adapter = byway.attach(model, method)
    for k, (module, side) in enumerate(zip((model.a, model.b), sides(adapter), strict=True)):
        module.weight.data.copy_(m(f"M(2,3,7,{3 + k},11,5)"))
        side.lora_A.data.copy_(m(f"M(2,3,{5 + k},2,7,3)"))
        side.lora_B.data.copy_(m(f"M(2,2,3,{5 + k},9,4)"))
        side.lora_E.data.copy_(torch.tensor([[0.5], [-0.2]]) * (1 + k))
    return model, adapter, torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.3, -0.4]])


def test_golden_forward_importance_penalty_and_allocation() -> None:
    case, (model, adapter, x) = GOLDEN["adalora"], golden()
    first, second = sides(adapter)
    y = model(x)
    assert close(y, case["y"], FORWARD)
    assert close(first.fold({"weight": torch.zeros(2, 3)})["weight"], case["delta_a"], FORWARD)
    expected, penalty = (case["orth_norm_A_of_a"] + case["orth_norm_B_of_a"]) * 0.1 / 4, first.penalty()
    assert penalty is not None and float(penalty.detach()) == pytest.approx(expected, abs=1e-6)
    (0.5 * y.pow(2).sum()).backward()
    assert all(side.observe(0.85, 0.85) for side in (first, second))
    for letter, side in (("a", first), ("b", second)):
        for factor in "ABE":
            gold = case["importance_first_update"][f"{letter}.lora_{factor}.default"]
            assert close(side.get_buffer(f"importance_{factor}"), gold["smoothed"], FORWARD)
            assert close(side.get_buffer(f"uncertainty_{factor}"), gold["uncertainty"], FORWARD)
    from byway.methods.lowrank.adaptive import _prune

    _prune([first, second], case["budget"])
    assert [first.kept.tolist(), second.kept.tolist()] == list(case["rank_pattern"].values())
    assert bool((first.lora_E == 0).all()) and bool((second.lora_E != 0).all())


def test_golden_budget_schedule() -> None:
    case = GOLDEN["adalora"]["schedule"]
    schedule = Schedule(case["tinit"], case["tfinal"], case["deltaT"], case["total_step"])
    steps = range(case["total_step"] + 1)
    assert [schedule.budget(s, case["init_budget"], case["target_budget"]) for s in steps] == case["budget_by_step_0_to_12"]
    assert [s for s in steps if schedule.masks(s)] == case["mask_applied_at_steps"]


def test_parameter_count_is_initial_rank_times_in_plus_out_plus_one() -> None:
    adapter = byway.attach(build("llama"), AdaLoRA(initial_rank=5, rank=3, targets=["q_proj", "v_proj"]))
    assert adapter.num_parameters == 3 * 5 * ((32 + 32 + 1) + (32 + 16 + 1))


# ---- HF peft


OPTIONS: dict[str, Any] = {"targets": ["q_proj", "v_proj"], "rank": 2, "initial_rank": 4, "alpha": 6, "orthogonality": 0.3}
TOTAL, INITIAL, FINAL, INTERVAL = 12, 2, 3, 2


def theirs_of(family: str, targets: list[str], **more: Any) -> Any:
    config = peft.AdaLoraConfig(
        target_modules=targets, target_r=2, init_r=4, lora_alpha=6, orth_reg_weight=0.3, total_step=TOTAL, tinit=INITIAL, tfinal=FINAL,
        deltaT=INTERVAL, fan_in_fan_out=family == "gpt2", **more,
    )  # fmt: skip
    return peft.get_peft_model(build(family), config)


def pair(family: str = "llama", targets: tuple[str, ...] = ("q_proj", "v_proj")) -> tuple[Any, byway.Adapter, Any]:
    ours, theirs = build(family), theirs_of(family, list(targets))
    steps = {"initial_steps": INITIAL, "final_steps": FINAL, "interval": INTERVAL}
    adapter = byway.attach(ours, AdaLoRA(**(OPTIONS | steps | {"targets": list(targets), "modules_to_save": "none"})))
    with torch.no_grad():
        for mine, other in matched(adapter, theirs):
            values = 0.3 * torch.randn(mine.shape)
            mine.copy_(values)
            other.copy_(values)
    return ours, adapter, theirs


def matched(adapter: byway.Adapter, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    own = dict(theirs.named_parameters())
    return [
        (side.get_parameter(name), own[f"base_model.model.{site.path}.{name}.default"])
        for site, side in adapter.side_paths()
        for name in ("lora_A", "lora_E", "lora_B")
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_goes_as_pefts(seed: int) -> None:
    """Losses with their penalty, scores, masks and every tensor, step by step through all phases of the schedule."""
    ours, adapter, theirs = pair()
    x = inputs("llama") | {"use_cache": False}
    labels = x["input_ids"]
    mine = torch.optim.SGD([p for _, p in adapter.named_parameters()], lr=0.5)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    ours.train()
    theirs.train()
    masked = set()
    for step in range(1, TOTAL + 1):
        penalty = penalties(ours)
        assert penalty is not None
        loss = ours(**x, labels=labels).loss + penalty
        expected = theirs.base_model(**x, labels=labels).loss
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        adapter.method.after_step(adapter, step, TOTAL)
        theirs.base_model.update_and_allocate(step)
        for a, b in matched(adapter, theirs):
            assert float((a - b).detach().norm()) <= 1e-4 * float(b.detach().norm()), step
        allocator = theirs.base_model.rankallocator
        for site, side in adapter.side_paths():
            assert isinstance(side, AdaptiveRank)
            key = f"model.{site.path}.lora_E.default"
            kept = (theirs.peft_config["default"].rank_pattern or {}).get(key.removeprefix("model."), [True] * 4)
            assert side.kept.tolist() == kept, step
            masked.add(tuple(kept))
            if step < TOTAL - FINAL:
                found = next(v for k, v in allocator.exp_avg_ipt.items() if k.endswith(f"{site.path}.lora_E.default"))
                assert float((side.get_buffer("importance_E") - found).norm()) <= 1e-3 * float(found.norm())
        mine.zero_grad()
        other.zero_grad()
    assert sum(int(side.living().sum()) for side in sides(adapter)) == 2 * len(sides(adapter))
    assert len(masked) > 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "targets"), [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "value"))])
def test_files_before_anything_is_taken_away_go_both_ways(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    ours, adapter, theirs = pair(family, targets)
    theirs.eval()
    x = inputs(family)
    assert relative(ours(**x).logits, theirs(**x).logits) < 1e-6
    adapter.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    assert close(loaded(**x).logits, ours(**x).logits, 1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = build(family)
    back = byway.load(again, tmp_path / "theirs")
    assert isinstance(back.method, AdaLoRA) and back.notes == ()
    assert close(again(**x).logits, theirs(**x).logits, 1e-5)


def pruned(model: Any, adapter: byway.Adapter, steps: int = TOTAL) -> None:
    x = inputs("llama") | {"use_cache": False}
    optimizer = torch.optim.SGD([p for _, p in adapter.named_parameters()], lr=0.5)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        adapter.method.after_step(adapter, step, TOTAL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [6, 7, TOTAL])  # 7: what was taken away at 6 has moved since
def test_what_was_pruned_is_smaller_in_the_file_and_gives_the_same_logits_in_peft(steps: int, tmp_path: Path) -> None:
    ours, adapter, _ = pair()
    pruned(ours, adapter, steps)
    adapter.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    x = inputs("llama")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    assert close(loaded(**x).logits, ours(**x).logits, 1e-5)
    again = build("llama")
    back = byway.load(again, tmp_path / "ours")
    assert close(again(**x).logits, ours(**x).logits, 1e-6)
    if steps != 7:
        assert config["total_step"] == TOTAL and config["tinit"] == INITIAL
        assert any(not all(flags) for flags in config["rank_pattern"].values())
        assert back.num_parameters < adapter.num_parameters
    byway.load(build("llama"), back.save(tmp_path / "twice"))
    twice = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "twice").eval()
    assert close(twice(**x).logits, ours(**x).logits, 1e-5)
    byway.merge(again)
    assert close(again(**x).logits, ours(**x).logits, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_pruned_is_loaded_with_the_scale_of_the_first_rank(tmp_path: Path) -> None:
    _, _, theirs = pair()
    x = inputs("llama") | {"use_cache": False}
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for step in range(1, TOTAL + 1):
        optimizer.zero_grad()
        theirs(**x, labels=x["input_ids"]).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval()
    expected = theirs(**x).logits
    theirs.save_pretrained(str(tmp_path))
    model = build("llama")
    adapter = byway.load(model, tmp_path)
    assert close(model(**x).logits, expected, 1e-5)
    assert {side.rank for side in sides(adapter)} != {4}
    assert {side.scale for side in sides(adapter)} == {6 / (4 + 1e-5)}


# ---- a run


def test_state_that_the_schedule_needs_is_in_the_state_dict() -> None:
    one, two = pair()[:2], pair()[:2]
    pruned(*one, steps=5)
    two[0].load_state_dict(one[0].state_dict())
    for model, adapter in (one, two):
        x = inputs("llama") | {"use_cache": False}
        for step in (6, 7):
            model.zero_grad()
            model(**x, labels=x["input_ids"]).loss.backward()
            adapter.method.after_step(adapter, step, TOTAL)
    assert all(torch.equal(a, b) for a, b in zip(one[1].state_dict().values(), two[1].state_dict().values(), strict=True))


def test_without_gradients_or_in_too_short_a_run_it_says_so() -> None:
    model = build("llama")
    adapter = byway.attach(model, AdaLoRA(**OPTIONS, initial_steps=4, final_steps=4))
    with pytest.raises(AdapterError, match="before zero_grad"):
        adapter.method.after_step(adapter, 1, 20)
    with pytest.raises(ConfigError, match=r"8 steps.*4 \+ 4"):
        adapter.method.after_step(adapter, 1, 8)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)alpha is 0.*initial_steps is 1.5.*beta1 is 1"):
        AdaLoRA(alpha=0, beta1=1.0, initial_steps=1.5)
    with pytest.raises(ConfigError, match="rank is 9 and initial_rank only 4"):
        AdaLoRA(rank=9, initial_rank=4)
    with pytest.raises(ConfigError, match="rank_pattern has a rank above initial_rank"):
        AdaLoRA(rank_pattern={"q_proj": 13})
    with pytest.raises(ConfigError, match="no steps are left"):
        AdaLoRA(initial_steps=0.5, final_steps=0.5)
    with pytest.raises(TargetError, match="initial_rank 20 is more than"):
        byway.attach(build("llama"), AdaLoRA(initial_rank=20, targets=["v_proj"]))
    with pytest.raises(TargetError):
        byway.attach(build("llama"), AdaLoRA(targets=["embed_tokens"]))
    path = byway.attach(build("llama"), AdaLoRA(**OPTIONS)).save(tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    config["rank_pattern"] = {"model.layers.0.self_attn.q_proj.lora_E": 3}
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="not a list of true and false"):
        byway.load(build("llama"), path)


@pytest.mark.filterwarnings("ignore")
def test_everything_taken_away_from_one_map_is_an_empty_update(tmp_path: Path) -> None:
    model, x = build("llama"), inputs("llama")
    adapter = byway.attach(model, AdaLoRA(**OPTIONS))
    randomize(adapter.named_parameters())
    side = sides(adapter)[0]
    side.kept.zero_()
    side.silence()
    adapter.save(tmp_path)
    again = build("llama")
    byway.load(again, tmp_path, trainable=True)
    assert close(again(**x).logits, model(**x).logits, 1e-6)
    again(**x).logits.sum().backward()
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert close(loaded(**x).logits, model(**x).logits, 1e-5)
