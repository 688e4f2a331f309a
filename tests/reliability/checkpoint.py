"""Checks 53-60: checkpoints and resuming."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import byway
from byway.errors import RunError
from byway.recipe.recipe import Recipe
from byway.train.checkpoint import Progress, verify_seal, write
from byway.train.reporting.events import Event, Saved
from byway.train.setup import prepare
from tests.reliability.table import Action, Case, World, check, recipe

STATE = ("adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "complete.json")


def resumed(change: Callable[[Path], None], *says: str, code: int = 2, overrides: tuple[str, ...] = ()) -> Case:
    """``byway train --resume --dry-run`` after `change` of the folder of checkpoints (one for each of three steps)."""

    def make(world: World) -> Action:
        change(world.own_run() / "checkpoints")
        return ["train", world.recipe(), "--resume", "--dry-run", *overrides]

    return Case(make=make, code=code, says=says)


def nothing(folder: Path) -> None:
    pass


def empty_newest(folder: Path) -> None:
    (folder / "step-50").mkdir()


def unsealed_newest(folder: Path) -> None:
    (folder / "step-3" / "complete.json").unlink()


def all_unsealed(folder: Path) -> None:
    for step in folder.iterdir():
        (step / "complete.json").unlink()


def truncated(name: str, *steps: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for step in steps:
            file = folder / f"step-{step}" / name
            file.write_bytes(file.read_bytes()[:100])

    return change


def by_number(folder: Path) -> None:
    """Steps 9 and 10 and an invalid name, with reversed dates."""
    shutil.copytree(folder / "step-3", folder / "step-10")
    shutil.copytree(folder / "step-3", folder / "step-9")
    shutil.copytree(folder / "step-3", folder / "step-abc")
    os.utime(folder / "step-10", (1, 1))
    os.utime(folder / "step-1", (2e9, 2e9))


def other_rows(world: World) -> Action:
    world.own_run()
    world.rows({"text": "something else"}, {"text": "and more"}, {"text": "and more still"}, name="train.jsonl")
    return ["train", world.recipe(), "--resume"]


def other_base(world: World) -> Action:
    from byway.base.quiet import quiet
    from tests.reliability.conftest import llama

    world.own_run()
    with quiet():
        llama(intermediate_size=64).save_pretrained(world.own_base())
    return ["train", world.recipe(base={"model": "base"}), "--resume"]


def disk_full_at_each_size(world: World) -> Action:
    """Limit files to one byte less than each file of a checkpoint: whichever is too large, the old checkpoint stays."""
    world.texts()
    session = prepare(Recipe.from_dict(recipe(world.shared.base)), note=lambda text: None)
    folder = world.root / "checkpoints"

    def save(step: int) -> Path:
        return write(folder, Progress(step=step), session.essentials, session.adapters, session.optimizer, None, 2)

    good = save(1)
    sizes = sorted({file.stat().st_size for file in good.rglob("*") if file.is_file()})
    errors: list[RunError] = []

    def act() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            for size in sizes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
                try:
                    save(2)
                except RunError as error:
                    errors.append(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert len(errors) == len(sizes) > 3 and verify_seal(good) == ""
        assert [entry.name for entry in folder.iterdir()] == ["step-1"], "no stray files"
        raise errors[-1]

    return act


def bfloat16_in_two_parts(world: World) -> Action:
    """With dropout, stopped in the middle of an epoch: adapter, moments and generators equal an uninterrupted run."""
    world.texts()
    method = {"dropout": 0.3}
    train = {"schedule": "constant", "warmup_steps": 0, "epochs": 2}
    base = {"dtype": "bf16"}

    def made(output: str, steps: int) -> dict[str, object]:
        return recipe(world.shared.base, base=base, method=method, train={**train, "max_steps": steps}, output=output)

    def act() -> None:
        byway.train(made("whole", 4))
        byway.train(made("parts", 2))
        byway.train(made("parts", 4), resume=True)
        for name in STATE[:3]:
            one, two = (world.root / run / "checkpoints" / "step-4" / name for run in ("whole", "parts"))
            assert one.read_bytes() == two.read_bytes(), name
        print("equal")

    return act


def file_in_place_of_the_folder(world: World) -> Action:
    """During the run, something else takes the place of its checkpoints."""
    world.texts()

    def watch(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 1:
            shutil.rmtree(event.path.parent)
            event.path.parent.write_text("in the way")

    return lambda: byway.train(recipe(world.shared.base), on_event=watch)


CHECKS = [
    check(
        53,
        "the disk is full while a checkpoint is written",
        "tests/train/test_checkpoint.py::test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint",
        "tests/core/disk/test_files.py::test_leftovers_of_a_killed_writer_are_swept_by_the_next_one",
        each_size=Case(make=disk_full_at_each_size, error=RunError, code=3, says=("step-2", "File too large"), writes=False),
    ),
    check(
        54,
        "a resumed run is the uninterrupted one",
        "tests/train/test_resume.py::test_interrupted_at_any_step_and_resumed_equals_uninterrupted",
        "tests/train/test_resume.py::test_a_stop_during_an_evaluation_makes_it_again_at_the_resume",
        bfloat16=Case(make=bfloat16_in_two_parts, code=0, says=("equal",), writes=True),
    ),
    check(
        55,
        "the newest checkpoint is empty or not complete",
        "tests/train/test_checkpoint.py::test_an_empty_newest_directory_is_passed_over_and_none_at_all_is_refused",
        empty=resumed(empty_newest, "step-50 is skipped", "complete.json", "resuming from", "step-3", code=0),
        unsealed=resumed(unsealed_newest, "step-3 is skipped", "complete.json", "resuming from", "step-2", code=0),
        all_unsealed=resumed(all_unsealed, "no complete checkpoint", "step-3", "step-1", "--overwrite"),
        no_run=Case(make=lambda world: world.train("--resume"), says=("'run'", "no run to resume")),
    ),
    check(
        56,
        "a state file cut to 100 bytes",
        "tests/train/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_loudly",
        newest=resumed(truncated(STATE[1], 3), "step-3 is skipped", STATE[1], "resuming from", "step-2", code=0),
        **{name: resumed(truncated(name, 1, 2, 3), "no complete checkpoint", f"step-3/{name}") for name in STATE[:4]},
        **{STATE[4]: resumed(truncated(STATE[4], 1, 2, 3), "no complete checkpoint", STATE[4])},
    ),
    check(
        57,
        "going on with another method, seed, data or base",
        "tests/train/test_checkpoint.py::test_a_resume_with_other_essentials_is_refused_field_by_field",
        "tests/train/test_checkpoint.py::test_learning_rate_and_logging_may_change_and_that_is_said",
        fields=resumed(
            nothing,
            "method.rank: 4 in the checkpoint, 2 now",
            "method.alpha",
            "method.targets",
            "train.seed",
            "train.weight_decay",
            "learning_rate",
            overrides=("method.rank=2", "method.alpha=3", "method.targets=[q_proj]", "train.seed=1", "train.weight_decay=0.1"),
        ),
        rows=Case(make=other_rows, says=("data.train", "differ from those of the checkpoint")),
        base=Case(make=other_base, says=("base.model", "different base", "intermediate")),
        allowed=resumed(
            nothing,
            "train.learning_rate: 0.01 in the checkpoint, 0.001 now",
            code=0,
            overrides=("train.learning_rate=1e-3", "train.epochs=2"),
        ),
    ),
    check(
        58,
        "checkpoints are counted by number",
        "tests/train/test_checkpoint.py::test_only_the_newest_checkpoints_are_kept_and_counted_by_number",
        names=resumed(by_number, "resuming from run/checkpoints/step-10", code=0),
    ),
    check(
        59,
        "SIGINT, SIGTERM, a second signal",
        "tests/train/test_command.py::test_a_signal_to_the_command_saves_and_its_resume_equals_the_whole_run",
        "tests/train/test_resume.py::test_a_second_signal_does_not_wait_and_handlers_are_put_back",
    ),
    check(
        60,
        "the folder of checkpoints is taken away while training",
        "tests/train/test_checkpoint.py::test_a_checkpoint_folder_that_is_removed_while_training_is_made_again",
        replaced=Case(make=file_in_place_of_the_folder, error=RunError, code=3, says=("checkpoints", "step-2"), writes=True),
    ),
]
