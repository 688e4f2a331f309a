"""The training loop against code that is not ours: transformers' loss, torch's optimizer, hashes of files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import byway
from byway.core.method import BuildContext, Method, Placement
from byway.core.slots import SidePath, Site, penalties
from byway.errors import RunError
from byway.recipe.recipe import Recipe
from byway.train import train
from byway.train.reporting.events import Evaluated, Event, Note, Planned, Saved, Stepped
from byway.train.setup import prepare
from tests.train.conftest import RecipeMaker, losses, write_rows

pytestmark = pytest.mark.usefixtures("quick_picture")


def saved_adapter(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def test_the_run_equals_a_plain_loop_over_transformers_own_loss(make_recipe: RecipeMaker) -> None:
    """Uneven rows, many packed micro-batches: as one padded batch per step, the model's mean loss and torch's AdamW."""
    recipe = Recipe.from_dict(
        make_recipe(
            method={"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.0},
            train={
                "epochs": 3,
                "rows_per_step": 24,
                "weight_decay": 0.1,
                "warmup_steps": 0,
                "schedule": "linear",
                "micro_batch_tokens": 40,
            },
        )
    )
    run = train(recipe)
    rows = [row for row in losses(run.directory) if not row.get("eval")]

    session = prepare(Recipe.from_dict(recipe.to_dict() | {"output": recipe.output + "-twin"}), note=print)
    assert len(session.order.epoch(0)[0]) > 3, "the step must be cut into micro-batches for this to mean anything"
    model, tokenizer = session.model, session.tokenizer
    assert tokenizer is not None
    texts = [json.loads(line)["text"] for line in Path(str(recipe.data.train)).read_text(encoding="utf-8").splitlines()]
    ids = [torch.tensor([*tokenizer.encode(text, add_special_tokens=False), 2]) for text in texts]
    batch = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step, row in enumerate(rows):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        loss = model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["learning_rate"] == pytest.approx(1e-2 * (1 - step / 3))
        optimizer.step()
        optimizer.zero_grad()
    last = byway.base_state_dict(model)  # the base did not change in either run
    assert all(torch.equal(last[k], v) for k, v in byway.base_state_dict(run.model).items())
    assert isinstance(run.adapter, byway.Adapter)
    final = load_file(run.directory / "checkpoints" / "step-3" / "adapter.safetensors")
    for name, parameter in session.adapters[0].named_parameters():
        torch.testing.assert_close(final[name], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [{"pack": "off"}, {"labels_only": "off"}, {"frontier": "off"}, {"checkpointing": "on"}])
def test_each_lever_leaves_the_losses_as_they_are(make_recipe: RecipeMaker, engine: dict[str, str]) -> None:
    method = {"name": "lora", "rank": 4, "targets": "all-linear", "dropout": 0.0}
    plain = train(make_recipe("plain", engine=engine, method=method)).directory
    other = train(make_recipe("other", method=method)).directory
    for a, b in zip(losses(plain), losses(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_base_is_bit_identical_after_training(make_recipe: RecipeMaker, llama_dir: Path) -> None:
    file = llama_dir / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    run = train(make_recipe())
    stored, now = load_file(file), byway.base_state_dict(run.model)
    assert stored and all(torch.equal(now[name], tensor) for name, tensor in stored.items())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert any(bool(p.any()) for name, p in run.model.named_parameters() if name.endswith("lora_B")), "something was trained"


def test_the_same_seed_gives_the_same_run_and_another_seed_another(make_recipe: RecipeMaker) -> None:
    one, two, three = (train(make_recipe(name, train={"seed": seed})).directory for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert losses(one) == losses(two) != losses(three)
    first, second = saved_adapter(one), saved_adapter(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_the_callers_random_state_and_threads_alone(make_recipe: RecipeMaker) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.set_num_threads(2)
    train(make_recipe(train={"threads": 1, "epochs": 0.3}))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == 2


def test_the_run_directory_holds_what_the_contract_names(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe())
    names = {entry.name for entry in run.directory.iterdir()}
    assert names == {"adapter", "recipe.yaml", "metrics.jsonl", "loss.png", "report.html", "checkpoints"}
    assert Recipe.load(run.directory / "recipe.yaml").to_dict() == Recipe.from_dict(make_recipe()).to_dict()
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "labels", "seconds", "memory_mb"}
    steps = [row for row in rows if not row.get("eval")]
    assert [row["step"] for row in steps] == list(range(1, 7)) and all(set(row) == keys for row in steps)
    assert [row["step"] for row in rows if row.get("eval")] == [3, 6], "without eval_every after each epoch"
    assert sum(row["tokens"] for row in steps) == run.metrics["tokens"] > run.metrics["labels"] == sum(row["labels"] for row in steps)
    assert (run.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page


def test_the_saved_adapter_gives_the_runs_own_logits(make_recipe: RecipeMaker, llama_dir: Path) -> None:
    run = train(make_recipe())
    ids = torch.tensor([[1, 8, 20, 33, 9]])
    model, _ = byway.load_base(llama_dir)
    bare = model(input_ids=ids).logits
    byway.load(model, run.directory / "adapter")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, run.model(input_ids=ids).logits)
        assert not torch.allclose(model(input_ids=ids).logits, bare, atol=1e-3)


def overconfident(make_recipe: RecipeMaker, folder: Path, **settings: Any) -> dict[str, Any]:
    """A recipe whose evaluations improve, then get much worse: the model becomes too sure of w2 after w1."""
    recipe = make_recipe(train={"learning_rate": 0.03, "schedule": "constant", **settings}) | {"method": {"name": "full"}}
    write_rows(folder / "train.jsonl", [{"text": "w1 w2 " * 8}] * 24)
    write_rows(folder / "eval.jsonl", [{"text": "w1 w2 w1 w3 " * 4}] * 6)
    return recipe


def test_the_best_adapter_is_kept_and_the_report_says_which(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    """The kept adapter is that of the best evaluation, neither the first nor the last."""
    recipe = overconfident(make_recipe, tmp_path, eval_every=1, epochs=3, keep_checkpoints=9)
    run = train(recipe)
    evals = [row for row in losses(run.directory) if row.get("eval")]
    best = min(evals, key=lambda row: row["loss"])
    assert best["loss"] < min(evals[0]["loss"], evals[-1]["loss"]) - 0.5, "the evaluations must get better, then worse"
    assert run.metrics["best_step"] == best["step"] and run.metrics["eval_loss"] == best["loss"]
    assert isinstance(run.adapter, byway.Adapter)
    kept = load_file(run.directory / "checkpoints" / f"step-{best['step']}" / "adapter.safetensors")
    assert all(torch.equal(kept[name], p) for name, p in run.adapter.named_parameters())
    assert f"adapter/ holds step {best['step']}" in (run.directory / "report.html").read_text(encoding="utf-8")


def test_without_rows_to_evaluate_on_the_last_step_is_kept(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(data={"eval": None}))
    assert "best_step" not in run.metrics and not any(key.startswith("eval_") for key in run.metrics)
    assert "adapter/ holds the last step" in (run.directory / "report.html").read_text(encoding="utf-8")


def test_evaluating_between_two_steps_changes_nothing(make_recipe: RecipeMaker) -> None:
    often = train(make_recipe("often", train={"eval_every": 1, "save_every": 6})).directory
    never = train(make_recipe("never", data={"eval": None}, train={"save_every": 6})).directory
    assert [row for row in losses(often) if not row.get("eval")] == losses(never)
    a, b = (load_file(d / "checkpoints" / "step-6" / "adapter.safetensors") for d in (often, never))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_patience_ends_a_run_that_does_not_improve(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    run = train(overconfident(make_recipe, tmp_path, epochs=20, patience=2))
    evals = [row["loss"] for row in losses(run.directory) if row.get("eval")]
    assert len(evals) < 20 and min(evals[-2:]) >= min(evals[:-2])


def test_events_tell_the_run_in_order_and_nothing_is_printed(make_recipe: RecipeMaker, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[Event] = []
    train(make_recipe(), on_event=seen.append)
    assert next(type(e) for e in seen if not isinstance(e, Note)) is Planned
    plan = next(e.plan for e in seen if isinstance(e, Planned))
    assert plan.steps == sum(isinstance(e, Stepped) for e in seen) == 6
    assert plan.trained == sum(4 * (i + o) for i, o in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]) * 2
    assert next(e.best for e in seen if isinstance(e, Evaluated)) and sum(isinstance(e, Saved) for e in seen) == 2
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = make_recipe(
        train={"learning_rate": 100, "weight_decay": 1e6, "schedule": "constant", "warmup_steps": 0, "save_every": 1, "max_grad_norm": None}
    )
    with pytest.raises(RunError) as caught:
        train(recipe)
    last = losses(tmp_path / "run")[-1]
    assert last["loss"] is None and last["nonfinite"] is True
    assert f"at step {last['step']}" in caught.value.message and "train.jsonl:" in caught.value.message
    assert caught.value.exit_code == 3
    there = sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    assert there and f"step-{last['step'] - 1}" in there and f"step-{last['step']}" not in there
    assert there[-1] in caught.value.hint and not (tmp_path / "run" / "adapter").exists()


class _Backwards(torch.autograd.Function):
    """Identity whose gradient is not finite while `broken` counts down."""

    broken = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Backwards.broken -= 1
        return grads[0] * math.inf if _Backwards.broken >= 0 else grads[0]


class FragileSide(SidePath):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + _Backwards.apply(self.bias)

    def penalty(self) -> Tensor:
        return (self.bias * 0.5).pow(2).sum()


@dataclass(frozen=True, kw_only=True)
class Fragile(Method):
    """A bias after the last norm, whose gradient can be broken."""

    def plan(self, model: nn.Module) -> Placement:
        return Placement([Site("model.norm", model.get_submodule("model.norm"))])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return FragileSide(32)


def fragile_recipe(make_recipe: RecipeMaker, **train_keys: Any) -> dict[str, Any]:
    keys = {"micro_batch_tokens": 4000, **train_keys}
    return make_recipe(method=Fragile(), train=keys, engine={"pack": "off", "frontier": "off", "labels_only": "off"})


def broken_after_probe(times: int) -> Any:
    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            _Backwards.broken = times

    return watch


def test_a_gradient_that_is_not_finite_is_not_used_and_counted(make_recipe: RecipeMaker) -> None:
    run = train(fragile_recipe(make_recipe), on_event=broken_after_probe(2))
    rows = [row for row in losses(run.directory) if not row.get("eval")]
    assert [row.get("skipped", False) for row in rows] == [True, True, False, False, False, False]
    assert rows[0]["grad_norm"] is None and rows[0]["nonfinite"] and rows[0]["loss"] is not None
    assert run.metrics["skipped_steps"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_five_gradients_in_a_row_that_are_not_finite_stop_the_run(make_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="5 steps in a row"):
        train(fragile_recipe(make_recipe), on_event=broken_after_probe(100))
    assert len(losses(tmp_path / "run")) == 6  # five steps and the evaluation after the first epoch


def test_the_penalty_of_side_paths_is_added_once_a_step(make_recipe: RecipeMaker) -> None:
    run = train(fragile_recipe(make_recipe), on_event=broken_after_probe(0))
    value = penalties(run.model)
    bias = next(p for name, p in run.model.named_parameters() if name.endswith("byway.default.bias"))
    assert value is not None and bool(bias.any())
    assert value.item() == pytest.approx(0.25 * bias.double().pow(2).sum().item(), rel=1e-5)


def test_several_methods_are_attached_saved_and_returned_by_name(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe()
    recipe["method"] = [{"name": "lora", "rank": 2, "targets": ["q_proj"]}, {"name": "lora", "rank": 3, "targets": ["v_proj"]}]
    run = train(recipe)
    assert isinstance(run.adapter, tuple) and [a.name for a in run.adapter] == ["lora", "lora-2"]
    assert sorted(entry.name for entry in (run.directory / "adapter").iterdir()) == ["lora", "lora-2"]
    assert all((run.directory / "adapter" / name / "adapter_config.json").is_file() for name in ("lora", "lora-2"))


def test_epochs_may_be_a_fraction_and_max_steps_wins(make_recipe: RecipeMaker) -> None:
    assert train(make_recipe("half", train={"epochs": 1.5})).metrics["step"] == 5
    assert train(make_recipe("four", train={"max_steps": 4})).metrics["step"] == 4


def test_a_base_in_bfloat16_trains_float32_adapters(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(base={"dtype": "bf16"}))
    assert run.model.dtype == torch.bfloat16
    assert isinstance(run.adapter, byway.Adapter)
    assert {p.dtype for _, p in run.adapter.named_parameters()} == {torch.float32}
    rows = [row["loss"] for row in losses(run.directory) if not row.get("eval")]
    assert rows[-1] < rows[0]
