"""A resume reports what is broken, changed or missing; a checkpoint is written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from byway.errors import ConfigError, RunError
from byway.train import Stopped, train
from byway.train.checkpoint import complete, newest
from byway.train.reporting.events import Event, Note, Saved, Stepped
from tests.train.conftest import RecipeMaker, assert_same_run, build_recipe, interrupt_at, tree

pytestmark = pytest.mark.usefixtures("quick_picture")


@dataclass(frozen=True)
class Halted:
    """A stopped run, its recipe, and the same run uninterrupted."""

    recipe: dict[str, Any]
    folder: Path
    whole: Path


SETTINGS = {"save_every": 1, "keep_checkpoints": 3}


@pytest.fixture(scope="session")
def halted_once(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe whose run was stopped after step 5 of 6, and the whole run."""
    folder = tmp_path_factory.mktemp("halted")
    recipe = build_recipe(llama_dir, folder, train=SETTINGS)
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(5))
    return recipe, train(build_recipe(llama_dir, folder, "whole", train=SETTINGS)).directory


@pytest.fixture
def halted(halted_once: tuple[dict[str, Any], Path], tmp_path: Path) -> Halted:
    """A copy of the stopped run that may be damaged."""
    recipe, whole = halted_once
    shutil.copytree(recipe["output"], tmp_path / "run")
    rows = tmp_path / "train.jsonl"
    shutil.copy(recipe["data"]["train"], rows)
    own = recipe | {"output": str(tmp_path / "run"), "data": recipe["data"] | {"train": str(rows)}}
    return Halted(own, tmp_path / "run" / "checkpoints", whole)


def test_only_the_newest_checkpoints_are_kept_and_counted_by_number(halted: Halted) -> None:
    folder = halted.folder
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-3", "step-4", "step-5"]
    (folder / "step-abc").mkdir()
    shutil.copytree(folder / "step-5", folder / "step-10")
    shutil.copytree(folder / "step-5", folder / "step-9")
    os.utime(folder / "step-3", (2e9, 2e9))
    assert newest(folder)[0] == folder / "step-10"


@pytest.mark.parametrize(
    "name",
    ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "complete.json", "adapter/adapter_config.json"],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(halted: Halted, name: str) -> None:
    folder = halted.folder
    file = folder / "step-5" / name
    file.write_bytes(file.read_bytes()[:100])
    notes: list[Event] = []
    resumed = train(halted.recipe, resume=True, on_event=notes.append)
    said = " ".join(e.text for e in notes if isinstance(e, Note))
    assert "step-5" in said and name.rpartition("/")[2] in said and "is skipped" in said and "resuming from" in said and "step-4" in said
    assert_same_run(halted.whole, resumed.directory)


def test_an_empty_newest_directory_is_passed_over_and_none_at_all_is_refused(halted: Halted) -> None:
    folder = halted.folder
    (folder / "step-50").mkdir()
    found, problems = newest(folder)
    assert found == folder / "step-5" and len(problems) == 1 and "step-50" in problems[0]
    for entry in folder.iterdir():
        (entry / "complete.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        train(halted.recipe, resume=True)


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("method", {"rank": 2}, "method.rank: 4 in the checkpoint, 2 now"),
        ("method", {"targets": ["q_proj"]}, "method.targets"),
        ("method", {"alpha": 3.0}, "method.alpha"),
        ("train", {"seed": 1}, "train.seed: 0 in the checkpoint, 1 now"),
        ("train", {"rows_per_step": 4}, "train.rows_per_step"),
        ("train", {"adam_beta2": 0.95}, "train.adam_beta2"),
        ("data", {"max_length": 10}, "data.train: the rows differ from those of the checkpoint"),
        ("base", {"dtype": "bf16"}, "base.dtype"),
    ],
)
def test_a_resume_with_other_essentials_is_refused_field_by_field(halted: Halted, section: str, change: dict[str, Any], named: str) -> None:
    recipe, folder = halted.recipe, halted.folder
    before = tree(folder.parent)
    with pytest.raises(ConfigError) as caught:
        train(recipe | {section: recipe[section] | change}, resume=True)
    assert named in caught.value.message and caught.value.exit_code == 2
    assert tree(folder.parent) == before


def test_a_changed_data_file_or_base_is_seen_and_a_moved_one_is_not(halted: Halted, llama_dir: Path, tmp_path: Path) -> None:
    recipe = halted.recipe
    data = Path(recipe["data"]["train"])
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("w1", "w2", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.train: the rows differ from those"):
        train(recipe, resume=True)
    data.write_text(text, encoding="utf-8")
    other = tmp_path / "other-base"
    shutil.copytree(llama_dir, other)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama_dir).config).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"base.model: a different base"):
        train(recipe | {"base": recipe["base"] | {"model": str(other)}}, resume=True)
    shutil.rmtree(other)
    shutil.copytree(llama_dir, other)
    moved = data.with_name("moved.jsonl")
    data.rename(moved)
    changed = recipe | {"base": recipe["base"] | {"model": str(other)}, "data": recipe["data"] | {"train": str(moved)}}
    assert train(changed, resume=True).metrics["step"] == 6


def test_learning_rate_and_logging_may_change_and_that_is_said(halted: Halted) -> None:
    recipe = halted.recipe
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
    assert "step-4" in caught.value.message and "File too large" in caught.value.message and caught.value.exit_code == 3
    folder = Path(recipe["output"]) / "checkpoints"
    assert [entry.name for entry in folder.iterdir()] == ["step-2"], "no stray files"
    whole = train(make_recipe("whole", train={"save_every": 2}))
    assert_same_run(whole.directory, train(recipe, resume=True).directory)


@pytest.mark.parametrize(
    "file", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "adapter", "complete.json"]
)
def test_whichever_file_does_not_fit_the_older_checkpoints_stay(halted: Halted, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from byway.train import checkpoint

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            wanted = {"to_json": "state.json", "save_adapters": "adapter", "seal": "complete.json"}.get(real.__name__) or given[0].name
            if wanted == file:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*given)

        return call

    before = tree(halted.folder)
    with monkeypatch.context() as patched:
        for name in ("write_safetensors", "to_json", "save_adapters", "seal"):
            patched.setattr(checkpoint, name, refusing(vars(checkpoint)[name]))
        with pytest.raises(RunError, match=r"step-6.*No space left on device \(ENOSPC\)") as caught:
            train(halted.recipe, resume=True)
    assert caught.value.exit_code == 3 and tree(halted.folder) == before
    assert_same_run(halted.whole, train(halted.recipe, resume=True).directory)


def test_a_checkpoint_folder_that_is_removed_while_training_is_made_again(make_recipe: RecipeMaker) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 2:
            shutil.rmtree(event.path.parent)

    run = train(make_recipe(train={"save_every": 2}), on_event=watch)
    assert [step for step, _ in complete(run.directory / "checkpoints")] == [6, 4]


def test_a_state_file_holds_no_pickle(make_recipe: RecipeMaker) -> None:
    run = train(make_recipe())
    files = [p for p in (run.directory / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    json.loads((run.directory / "checkpoints" / "step-6" / "state.json").read_text(encoding="utf-8"))
