"""``byway train`` and its output directory: errors come before anything is written; exit codes say what happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
import yaml

from byway.errors import BywayError, ConfigError
from byway.train import Run, train
from byway.train.checkpoint import complete
from byway.train.reporting.events import Evaluated, Event, Planned, Stepped
from tests.train.conftest import RecipeMaker, assert_same_run, build_recipe, losses, tree

pytestmark = pytest.mark.usefixtures("quick_picture")


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

    for again in (False, True):
        with pytest.raises(RuntimeError, match="out of luck"):
            train(recipe, on_event=fail)
        assert sorted(entry.name for entry in Path(recipe["output"]).iterdir()) == ["metrics.jsonl", "recipe.yaml"]
        run = train(recipe, resume=again)
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
    recipe = make_recipe()
    for section, keys in change.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    with pytest.raises(BywayError) as caught:
        train(recipe)
    assert caught.value.exit_code == 2 and not Path(recipe["output"]).exists()


def test_the_plan_is_told_before_the_first_file_is_written(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe()

    def watch(event: Event) -> None:
        if isinstance(event, Planned):
            assert not Path(recipe["output"]).exists()
            raise KeyError("enough")

    with pytest.raises(KeyError):
        train(recipe, on_event=watch)
    assert not Path(recipe["output"]).exists()


def write_recipe(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


LONG = {"max_steps": 40, "keep_checkpoints": 1, "save_every": 1000, "eval_every": 20}


@pytest.fixture(scope="module")
def whole(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of LONG that nothing interrupts."""
    return train(build_recipe(llama_dir, tmp_path_factory.mktemp("whole"), train=LONG))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_saves_and_its_resume_equals_the_whole_run(
    whole: Run, make_recipe: RecipeMaker, tmp_path: Path, number: int, code: int
) -> None:
    file = write_recipe(tmp_path, make_recipe("pieces", train=LONG))
    log = tmp_path / "pieces" / "metrics.jsonl"
    command = [sys.executable, "-m", "byway", "train", str(file)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) > 4):
            assert time.monotonic() < deadline and started.poll() is None, started.communicate()
            time.sleep(0.01)
        started.send_signal(number)
        out, err = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode == code, err
    assert (
        f"Continue with: byway train {file} --resume\n" in err and "/pieces/checkpoints/step-" in err and f"by {number.name} at step" in err
    )
    assert out == "" and "Traceback" not in err
    (kept,) = complete(tmp_path / "pieces" / "checkpoints")
    assert 0 < kept[0] < whole.metrics["step"]
    resumed = train(make_recipe("pieces", train=LONG), resume=True)
    assert_same_run(whole.directory, resumed.directory)


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_a_second_writer_is_refused_by_pid_and_the_first_is_not_disturbed(
    whole: Run, make_recipe: RecipeMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """Readers are not blocked, and neither is a dry run."""
    from byway.cli import main

    recipe = make_recipe(train=LONG)
    file = str(write_recipe(tmp_path, recipe))
    seen: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, Evaluated) and event.row["step"] == 20:
            before = tree(tmp_path / "run")
            code = Context().run(main, ["train", file, *options])  # the lock is held by a context, not by the process
            assert "Traceback" not in (said := capsys.readouterr().err)
            assert f"in use by process {os.getpid()}" in said
            seen.extend([code, Context().run(main, ["train", file, "--dry-run"]), main(["inspect", str(whole.directory / "adapter")])])
            assert tree(tmp_path / "run") == before

    finished = train(recipe, on_event=watch)
    assert seen == [2, 0, 0]
    assert_same_run(whole.directory, finished.directory)
    assert not (tmp_path / "run" / ".run.lock").exists()


def test_two_that_start_together_do_not_replace_each_other(make_recipe: RecipeMaker) -> None:
    """The second passes all checks, since the directory is empty; by the time it would write, the first has finished."""
    recipe = make_recipe()

    def meanwhile(event: Event) -> None:
        if isinstance(event, Planned):
            Context().run(train, recipe)

    with pytest.raises(ConfigError, match="was changed by another process"):
        train(recipe, on_event=meanwhile)
    before = tree(Path(recipe["output"]))
    with pytest.raises(ConfigError, match="was changed by another process"):
        train(recipe, overwrite=True, on_event=lambda e: Path(recipe["output"], "loss.png").touch() if isinstance(e, Planned) else None)
    assert tree(Path(recipe["output"])) == before and any(name.startswith("adapter/") for name in before)


def test_a_dry_run_may_look_at_a_directory_with_a_run(make_recipe: RecipeMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from byway.cli import main

    file = str(write_recipe(tmp_path, make_recipe()))
    train(make_recipe())
    before = tree(tmp_path)
    for options, said in (([], "already contains a run: --resume"), (["--resume"], "resuming from"), (["--overwrite"], "dry run")):
        assert main(["train", file, "--dry-run", *options]) == 0
        assert said in capsys.readouterr().err
    (tmp_path / "run" / "notes.txt").touch()
    assert main(["train", file, "--dry-run"]) == 2
    (tmp_path / "run" / "notes.txt").unlink()
    assert tree(tmp_path) == before


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
    assert (
        main(["train", file, "train.learning_rate=100", "train.weight_decay=1e6", "train.max_grad_norm=null", "train.warmup_ratio=0"]) == 3
    )
    assert "the loss is nan" in capsys.readouterr().err.lower()
    assert main(["train", file]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "run") and "\nengine   " in shown.err and "evaluation at step 6" in shown.err
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


def test_a_process_of_several_is_refused_before_anything_is_written(
    make_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from byway.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
        train(make_recipe())
    assert main(["train", str(write_recipe(tmp_path, make_recipe()))]) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
