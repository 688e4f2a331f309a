"""A resumed run is the uninterrupted one, bit for bit; and what is broken, changed or missing is said, not guessed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from byway.errors import ConfigError, RunError
from byway.train import Stopped, train
from byway.train.checkpoint import complete, newest
from byway.train.events import Event, Evaluating, Note, Planned, Saved, Stepped
from tests.train.conftest import RecipeMaker, losses


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.row["step"] == step:
            os.kill(os.getpid(), number)

    return watch


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    last = complete(one / "checkpoints")[0][1].name
    for name in ("adapter", "optimizer", "random"):
        a, b = (load_file(d / "checkpoints" / last / f"{name}.safetensors") for d in (one, two))
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (one, two))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("settings", [{}, {"eval_every": 2, "save_every": 3}, {"rows_per_step": None, "tokens_per_step": 60}])
def test_interrupted_at_any_step_and_resumed_equals_uninterrupted(make_recipe: RecipeMaker, seed: int, settings: dict[str, Any]) -> None:
    """With dropout, in the middle of epochs, once and again; also where an evaluation was due at the step of the interruption."""
    whole = train(make_recipe("whole", train=settings))
    draw, total = random.Random(seed), whole.metrics["step"]
    stops = sorted(draw.sample(range(1, total), 2))
    print("interrupted at", stops)
    recipe = make_recipe("pieces", train=settings)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(recipe, on_event=interrupt_at(stops[0]))
    assert isinstance(caught.value, Stopped) and caught.value.exit_code == 130
    assert caught.value.checkpoint is not None and caught.value.checkpoint.name == f"step-{stops[0]}"
    with pytest.raises(Stopped):
        train(recipe, resume=True, on_event=interrupt_at(stops[1]))
    torch.manual_seed(draw.randrange(10**6))  # nothing may depend on what was drawn before
    resumed = train(recipe, resume=True)
    assert_same_run(whole.directory, resumed.directory)
    assert {k: v for k, v in resumed.metrics.items() if k != "seconds"} == {k: v for k, v in whole.metrics.items() if k != "seconds"}


def test_a_stop_during_an_evaluation_makes_it_again_at_the_resume(make_recipe: RecipeMaker) -> None:
    whole = train(make_recipe("whole"))

    def watch(event: Event) -> None:
        if isinstance(event, Evaluating) and event.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = make_recipe("pieces")
    with pytest.raises(Stopped) as caught:
        train(recipe, on_event=watch)
    assert caught.value.exit_code == 143
    assert not any(row.get("eval") for row in losses(Path(recipe["output"])))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


def test_a_second_signal_does_not_wait_and_handlers_are_put_back(make_recipe: RecipeMaker) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def twice(event: Event) -> None:
        if isinstance(event, Stepped):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    recipe = make_recipe()
    with pytest.raises(Stopped) as caught:
        train(recipe, on_event=twice)
    assert caught.value.checkpoint is None and caught.value.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    train(recipe)  # nothing was saved: as good as empty


def test_a_finished_run_can_be_resumed_and_made_longer(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe(train={"schedule": "constant", "epochs": 1}))
    shutil.rmtree(run.directory / "adapter")
    again = train(make_recipe(train={"schedule": "constant", "epochs": 1}), resume=True)
    assert (again.directory / "adapter").is_dir() and again.metrics["step"] == 3
    longer = train(make_recipe(train={"schedule": "constant", "epochs": 2, "warmup_ratio": None, "warmup_steps": 1}), resume=True)
    whole = train(make_recipe("whole", train={"schedule": "constant", "epochs": 2, "warmup_ratio": None, "warmup_steps": 1}))
    assert_same_run(whole.directory, longer.directory)


def stopped_run(make_recipe: RecipeMaker, at: int = 5) -> tuple[dict[str, Any], Path]:
    recipe = make_recipe(train={"save_every": 1, "keep_checkpoints": 3})
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(at))
    return recipe, Path(recipe["output"]) / "checkpoints"


def test_only_the_newest_checkpoints_are_kept_and_counted_by_number(make_recipe: RecipeMaker) -> None:
    recipe, folder = stopped_run(make_recipe)
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-3", "step-4", "step-5"]
    (folder / "step-abc").mkdir()
    shutil.copytree(folder / "step-5", folder / "step-10")
    shutil.copytree(folder / "step-5", folder / "step-9")
    os.utime(folder / "step-3", (2e9, 2e9))
    assert newest(folder)[0] == folder / "step-10"


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "complete.json", "adapter/adapter_config.json"]
)
def test_a_damaged_checkpoint_is_passed_over_loudly(make_recipe: RecipeMaker, name: str) -> None:
    recipe, folder = stopped_run(make_recipe)
    whole = train(make_recipe("whole", train={"save_every": 1, "keep_checkpoints": 3}))
    file = folder / "step-5" / name
    file.write_bytes(file.read_bytes()[:100])
    notes: list[Event] = []
    resumed = train(recipe, resume=True, on_event=notes.append)
    said = " ".join(e.text for e in notes if isinstance(e, Note))
    assert "step-5" in said and name.rpartition("/")[2] in said and "is not used" in said and "resuming from" in said and "step-4" in said
    assert_same_run(whole.directory, resumed.directory)


def test_an_empty_newest_directory_is_passed_over_and_none_at_all_is_refused(make_recipe: RecipeMaker) -> None:
    recipe, folder = stopped_run(make_recipe)
    (folder / "step-50").mkdir()
    found, problems = newest(folder)
    assert found == folder / "step-5" and len(problems) == 1 and "step-50" in problems[0]
    for entry in folder.iterdir():
        (entry / "complete.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        train(recipe, resume=True)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("method", {"rank": 2}, "method.rank: 4 in the checkpoint, 2 now"),
        ("method", {"targets": ["q_proj"]}, "method.targets"),
        ("method", {"alpha": 3.0}, "method.alpha"),
        ("train", {"seed": 1}, "train.seed: 0 in the checkpoint, 1 now"),
        ("train", {"rows_per_step": 4}, "train.rows_per_step"),
        ("train", {"adam_beta2": 0.95}, "train.adam_beta2"),
        ("data", {"max_length": 10}, "data.train: the rows are not those of the checkpoint"),
        ("base", {"dtype": "bf16"}, "base.dtype"),
    ],
)
def test_a_resume_with_other_essentials_is_refused_field_by_field(
    make_recipe: RecipeMaker, section: str, change: dict[str, Any], named: str
) -> None:
    recipe, folder = stopped_run(make_recipe, at=2)
    before = tree(folder.parent)
    with pytest.raises(ConfigError) as caught:
        train(recipe | {section: recipe[section] | change}, resume=True)
    assert named in caught.value.message and caught.value.exit_code == 2
    assert tree(folder.parent) == before


def test_a_changed_data_file_or_base_is_seen_and_a_moved_one_is_not(make_recipe: RecipeMaker, llama_dir: Path, tmp_path: Path) -> None:
    recipe, folder = stopped_run(make_recipe, at=2)
    data = Path(recipe["data"]["train"])
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("w1", "w2", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.train: the rows are not those"):
        train(recipe, resume=True)
    data.write_text(text, encoding="utf-8")
    other = tmp_path / "other-base"
    shutil.copytree(llama_dir, other)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama_dir).config).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"base.model: another base"):
        train(recipe | {"base": recipe["base"] | {"model": str(other)}}, resume=True)
    shutil.rmtree(other)
    shutil.copytree(llama_dir, other)
    moved = data.with_name("moved.jsonl")
    data.rename(moved)
    changed = recipe | {"base": recipe["base"] | {"model": str(other)}, "data": recipe["data"] | {"train": str(moved)}}
    assert train(changed, resume=True).metrics["step"] == 6


def test_learning_rate_and_logging_may_change_and_that_is_said(make_recipe: RecipeMaker) -> None:
    recipe, _ = stopped_run(make_recipe, at=2)
    notes: list[Event] = []
    train(recipe | {"train": recipe["train"] | {"learning_rate": 1e-3, "keep_checkpoints": 1}}, resume=True, on_event=notes.append)
    said = [e.text for e in notes if isinstance(e, Note)]
    assert any("train.learning_rate: 0.01 in the checkpoint, 0.001 now" in text for text in said)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(make_recipe: RecipeMaker) -> None:
    """Files may not grow beyond 3 kB from step 3 on: the checkpoint there cannot be written."""
    recipe = make_recipe(train={"save_every": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.row["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))

    try:
        with pytest.raises(RunError) as caught:
            train(recipe, on_event=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "step-4" in caught.value.message and "EFBIG" in caught.value.message and caught.value.exit_code == 3
    folder = Path(recipe["output"]) / "checkpoints"
    assert [entry.name for entry in folder.iterdir()] == ["step-2"], "no stray files"
    whole = train(make_recipe("whole", train={"save_every": 2}))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


def test_a_checkpoint_folder_that_is_removed_while_training_is_made_again(make_recipe: RecipeMaker) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 2:
            shutil.rmtree(event.path.parent)

    run = train(make_recipe(train={"save_every": 2}), on_event=watch)
    assert [step for step, _ in complete(run.directory / "checkpoints")] == [6, 4]


# ---------------------------------------------------------------- the output directory


def test_an_output_that_holds_a_run_needs_resume_or_overwrite(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe())
    before = tree(run.directory)
    with pytest.raises(ConfigError, match="--overwrite") as caught:
        train(make_recipe())
    assert caught.value.exit_code == 2 and tree(run.directory) == before
    (run.directory / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        train(make_recipe(), overwrite=True)
    (run.directory / "notes.txt").unlink()
    assert train(make_recipe(train={"epochs": 1}), overwrite=True).metrics["step"] == 3
    assert [step for step, _ in complete(run.directory / "checkpoints")] == [3]
    with pytest.raises(ConfigError, match="contradict"):
        train(make_recipe(), overwrite=True, resume=True)


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe()

    def fail(event: Event) -> None:
        if isinstance(event, Stepped):
            raise RuntimeError("out of luck")

    for again in ({}, {"resume": True}):
        with pytest.raises(RuntimeError, match="out of luck"):
            train(recipe, on_event=fail)
        assert sorted(entry.name for entry in Path(recipe["output"]).iterdir()) == ["metrics.jsonl", "recipe.yaml"]
        run = train(recipe, **again)
        assert [row["step"] for row in losses(run.directory) if not row.get("eval")] == [1, 2, 3, 4, 5, 6]
        shutil.rmtree(run.directory)


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "lora", "targets": ["q_prj"]}},
        {"data": {"train": "nowhere.jsonl", "task": "text"}},
        {"data": {"max_length": 1}},
        {"train": {"warmup_steps": 6, "warmup_ratio": None}},
        {"engine": {"pack": "on", "checkpointing": "sometimes"}},
        {"base": {"model": "./no-such-model"}},
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(make_recipe: RecipeMaker, change: dict[str, Any]) -> None:
    from byway.errors import BywayError

    recipe = make_recipe()
    for section, keys in change.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    with pytest.raises(BywayError) as caught:
        train(recipe)
    assert caught.value.exit_code == 2 and not Path(recipe["output"]).exists()


# ---------------------------------------------------------------- the command


def write_recipe(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_saves_and_its_resume_equals_the_whole_run(
    make_recipe: RecipeMaker, tmp_path: Path, number: int, code: int
) -> None:
    settings = {"epochs": 40, "keep_checkpoints": 1, "save_every": 1000}
    whole = train(make_recipe("whole", train=settings))
    file = write_recipe(tmp_path, make_recipe("pieces", train=settings))
    log = tmp_path / "pieces" / "metrics.jsonl"
    command = [sys.executable, "-m", "byway", "train", str(file)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) > 8):
            assert time.monotonic() < deadline and started.poll() is None, started.communicate()
            time.sleep(0.01)
        started.send_signal(number)
        out, err = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode == code, err
    assert "--resume" in err and out == "" and "Traceback" not in err
    (kept,) = complete(tmp_path / "pieces" / "checkpoints")
    assert 0 < kept[0] < whole.metrics["step"]
    resumed = train(make_recipe("pieces", train=settings), resume=True)
    assert_same_run(whole.directory, resumed.directory)


def test_a_dry_run_shows_recipe_modules_and_plan_and_writes_nothing(
    make_recipe: RecipeMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from byway.cli import main

    file = write_recipe(tmp_path, make_recipe())
    before = tree(tmp_path)
    assert main(["train", str(file), "--dry-run", "train.epochs=1"]) == 0
    shown = capsys.readouterr().out
    assert "epochs: 1" in shown and "self_attn.q_proj" in shown and "trained" in shown and "3 steps" in shown and "memory" in shown
    assert tree(tmp_path) == before


def test_the_command_reports_its_errors_by_exit_code(make_recipe: RecipeMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from byway.cli import main

    file = str(write_recipe(tmp_path, make_recipe()))
    assert main(["train", file, "--find-lr"]) == 2 and "does not exist yet" in capsys.readouterr().err
    assert main(["train", file, "--nproc", "2"]) == 2 and "does not exist yet" in capsys.readouterr().err
    assert main(["train", file, "method.rank=0"]) == 2 and "rank" in capsys.readouterr().err
    assert main(["train", file, "train.learning_rate=1e38", "train.max_grad_norm=null", "train.warmup_ratio=0"]) == 3
    assert "the loss is nan" in capsys.readouterr().err.lower()
    assert main(["train", file]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "run") and "plan:" in shown.err and "evaluation at step 6" in shown.err
    assert main(["train", file]) == 2 and "--resume" in capsys.readouterr().err


def test_bad_rows_stop_the_command_unless_they_are_to_be_skipped(
    make_recipe: RecipeMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from byway.cli import main

    recipe = make_recipe()
    data = Path(recipe["data"]["train"])
    data.write_text(data.read_text(encoding="utf-8") + '{"text": \n', encoding="utf-8")
    file = str(write_recipe(tmp_path, recipe))
    assert main(["train", file]) == 2 and "train.jsonl:25" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", file, "--skip-bad-rows"]) == 0
    assert "bad row" in capsys.readouterr().err


def test_the_plan_is_told_before_the_first_file_is_written(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe()

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            assert not Path(recipe["output"]).exists()
            raise KeyError("enough")

    with pytest.raises(KeyError):
        train(recipe, on_event=watch)
    assert not Path(recipe["output"]).exists()


def test_a_state_file_holds_no_pickle(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe())
    files = [p for p in (run.directory / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    json.loads((run.directory / "checkpoints" / "step-6" / "state.json").read_text(encoding="utf-8"))
