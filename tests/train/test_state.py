"""A checkpoint whose files are as they were written but do not go together is refused, in one sentence, before anything changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byway.cli import main
from byway.core.disk.files import read_json, seal, verify_seal
from byway.errors import AdapterError, ConfigError
from byway.recipe.recipe import Recipe
from byway.train import Stopped, checkpoint, randomness, train
from byway.train.essentials import check_unchanged
from byway.train.plan.memory import recorded
from byway.train.reporting.events import Event, Saved, Stepped
from byway.train.setup import Session, prepare
from tests.train.conftest import RecipeMaker, assert_same_run, build_recipe, interrupt_at, tree
from tests.train.test_command import write_recipe

pytestmark = pytest.mark.usefixtures("quick_picture")

STEP = 5
SETTINGS = {"save_every": 1, "keep_checkpoints": 1, "eval_every": 1}


@pytest.fixture(scope="module")
def halted(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run stopped after step 5 of 6, and the whole run."""
    folder = tmp_path_factory.mktemp("halted")
    recipe = build_recipe(llama_dir, folder, train=SETTINGS)
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(STEP))
    return recipe, train(build_recipe(llama_dir, folder, "whole", train=SETTINGS)).directory


Change = Callable[[Any], None]


def put(*path: Any) -> Change:
    """Set the value at a path of keys: ``put("progress", "step", -1)``."""
    *keys, last, value = path

    def change(state: Any) -> None:
        for key in keys:
            state = state[key]
        state[last] = value

    return change


def drop(*path: Any) -> Change:
    *keys, last = path

    def change(state: Any) -> None:
        for key in keys:
            state = state[key]
        del state[last]

    return change


def first(end: str, to: Callable[[torch.Tensor], torch.Tensor] | None) -> Change:
    """Replace the first tensor whose name ends like this; None: leave it out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(key for key in tensors if key.endswith(end))[0]
        tensor = tensors.pop(name)
        if to is not None:
            tensors[name] = to(tensor).contiguous()

    return change


def every(to: Callable[[torch.Tensor], torch.Tensor], end: str = "") -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: to(tensor).contiguous() for key, tensor in tensors.items() if key.endswith(end)})

    return change


def without_a_parameter(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0].rpartition("/")[0]
    for key in [key for key in tensors if key.startswith(f"{name}/")]:
        del tensors[key]


NUMBERS = [-1, 2**62, 10**400, "5", 5.5, None, True, [5], {}]
COUNTERS = ["step", "epoch", "position", "tokens", "labels", "evaluated", "stale", "skipped", "skipped_in_a_row"]
STATE: dict[str, Change] = {
    **{f"{name} {value!r:.12}": put("progress", name, value) for name in COUNTERS for value in NUMBERS},
    **{f"{name} missing": drop("progress", name) for name in ("best",)},
    **{f"{name} off by one": put("progress", name, value) for name, value in (("step", 4), ("step", 6), ("epoch", 2), ("position", 1))},
    "position beyond the data": put("progress", "position", 1000),
    "epoch beyond the data": put("progress", "epoch", 10**9),
    "everything huge": lambda s: s["progress"].update(step=10**12, epoch=10**11, position=2, tokens=10**13),
    "step back": lambda s: s["progress"].update(step=2, evaluated=2, best_step=2),
    "best step after the last": put("progress", "best_step", 6),
    "best step text": put("progress", "best_step", "3"),
    "best step zero": put("progress", "best_step", 0),
    "no best step": put("progress", "best_step", None),
    "best without its loss": put("progress", "best", {"perplexity": 1.0}),
    "best of text": put("progress", "best", {"loss": "low"}),
    "best null": put("progress", "best", None),
    "seconds text": put("progress", "seconds", "1"),
    "seconds negative": put("progress", "seconds", -1.0),
    "unknown in progress": put("progress", "rank", 0),
    "unknown part": put("ranks", {}),
    "unknown in optimizer": put("optimizer", "fused", True),
    "unknown essential": put("essentials", "world_size", 2),
    "unknown generator": put("random", "philox", {}),
    "format of the future": put("format", 2),
    "format text": put("format", "1"),
    "format true": put("format", True),
    "progress null": put("progress", None),
    "progress list": put("progress", [1]),
    **{f"no {part}": drop(part) for part in ("progress", "essentials", "optimizer", "random", "format")},
    **{f"{part} text": put(part, "x") for part in ("progress", "essentials", "optimizer", "random")},
    **{f"essentials without {part}": drop("essentials", part) for part in ("recipe", "rows", "base")},
    **{f"{part} of essentials a list": put("essentials", part, [1]) for part in ("recipe", "rows", "base", "cache", "memory")},
    "rows of numbers": put("essentials", "rows", {"train": 1}),
    "base of nothing": put("essentials", "base", {}),
    "layers of numbers": put("essentials", "memory", "layers", [1, 2]),
    "no micro tokens": put("essentials", "memory", "micro_tokens", 0),
    "unknown in memory": put("essentials", "memory", "offload", True),
    "no scaler": drop("optimizer", "scaler"),
    "scaler of another dtype": put("optimizer", "scaler", {"scale": 65536.0}),
    "scaler text": put("optimizer", "scaler", "x"),
    "python null": put("random", "python", None),
    "python without words": drop("random", "python", "words"),
    "python unknown": put("random", "python", "kind", "x"),
    "python version": put("random", "python", "version", 9),
    "python short": put("random", "python", "words", [1, 2, 3]),
    "python negative": put("random", "python", "words", 0, -1),
    "python huge": put("random", "python", "words", 0, 2**40),
    "python index": put("random", "python", "words", 624, 700),
    "python text": put("random", "python", "words", "x" * 625),
    "python gauss": put("random", "python", "gauss", "x"),
    "numpy gone": drop("random", "numpy"),
    "numpy beyond its words": put("random", "numpy", "position", 10**6),
    "numpy before its words": put("random", "numpy", "position", -5),
    "numpy text": put("random", "numpy", "position", "x"),
    "numpy has_gauss": put("random", "numpy", "has_gauss", 7),
    "numpy gauss": put("random", "numpy", "gauss", None),
}
RANDOM: dict[str, Change] = {
    "of another size": put("torch", torch.zeros(16, dtype=torch.uint8)),
    "of another kind": first("torch", lambda t: t.long()),
    "all zero": first("torch", torch.zeros_like),
    "gone": drop("torch"),
    "unknown": put("xpu", torch.zeros(16, dtype=torch.uint8)),
    "numpy of another size": first("numpy", lambda t: t[:-1]),
    "numpy as floats": first("numpy", lambda t: t.double()),
    "numpy negative": first("numpy", lambda t: -t),
    "numpy in two rows": first("numpy", lambda t: t.view(2, -1)),
    "numpy gone": drop("numpy"),
}
OPTIMIZER: dict[str, Change] = {
    "nothing": lambda tensors: tensors.clear(),
    "a parameter missing": without_a_parameter,
    **{f"{end} missing": first(end, None) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} misshapen": first(end, lambda t: t[None]) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} transposed": first(end, lambda t: t.T) for end in ("/exp_avg", "/exp_avg_sq")},
    **{f"{end} of integers": first(end, lambda t: t.int()) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} in 16 bits": first(end, lambda t: t.bfloat16()) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} nan": first(end, lambda t: t * float("nan")) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} infinite": first(end, lambda t: t + float("inf")) for end in ("/step", "/exp_avg", "/exp_avg_sq")},
    **{f"{end} negative": first(end, lambda t: -t - 1) for end in ("/step", "/exp_avg_sq")},
    "counts huge": every(lambda t: t + 1000, "/step"),
    "counts broken": every(lambda t: t - 0.5, "/step"),
    "counts back to zero": every(torch.zeros_like, "/step"),
    "unknown": put("base.weight/exp_avg", torch.zeros(2)),
    "unknown key": lambda t: t.update({sorted(t)[0].rpartition("/")[0] + "/max_exp_avg_sq": torch.zeros(2)}),
}
ADAPTER: dict[str, Change] = {
    "missing": first("", None),
    "misshapen": first("", lambda t: t[:1]),
    "of integers": first("", lambda t: t.int()),
    "in 16 bits": every(lambda t: t.bfloat16()),
    "unknown": put("base.lora_A", torch.zeros(2)),
    "nothing": lambda tensors: tensors.clear(),
}
CASES = [("state.json", name, change) for name, change in STATE.items()] + [
    (f"{file}.safetensors", name, change)
    for file, changes in {"random": RANDOM, "optimizer": OPTIMIZER, "adapter": ADAPTER}.items()
    for name, change in changes.items()
]


def apply(folder: Path, file: str, change: Change) -> None:
    """Change a file of a checkpoint and seal it again."""
    path = folder / file
    if path.suffix == ".json":
        state = read_json(path)
        change(state)
        path.write_text(json.dumps(state), encoding="utf-8")
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    seal(folder)
    assert verify_seal(folder) == ""


@pytest.fixture(scope="module")
def session(halted: tuple[dict[str, Any], Path]) -> Session:
    """The stopped run, ready to continue."""
    return prepare(Recipe.from_dict(halted[0]), resume=True, note=lambda text: None)


@pytest.mark.parametrize(("file", "change"), [pytest.param(file, change, id=f"{file}: {what}") for file, what, change in CASES])
def test_a_state_that_does_not_go_together_is_refused(
    halted: tuple[dict[str, Any], Path], session: Session, tmp_path: Path, file: str, change: Change
) -> None:
    """By the same calls as in a resumed run. Generators, adapters and optimizer are as they were."""
    folder = shutil.copytree(Path(halted[0]["output"], "checkpoints", f"step-{STEP}"), tmp_path / f"step-{STEP}")
    resume(folder, session)
    apply(folder, file, change)
    before = randomness.snapshot()[0], {name: tensor.clone() for name, tensor in checkpoint.state_of(session.adapters).items()}
    with pytest.raises((ConfigError, AdapterError)) as caught:
        resume(folder, session)
    assert caught.value.exit_code == 2 and f"step-{STEP}" in caught.value.message
    after = randomness.snapshot()[0], checkpoint.state_of(session.adapters)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(before, after, strict=True) for name in one)


def resume(folder: Path, session: Session) -> None:
    saved = checkpoint.read(folder)
    recorded(saved.essentials, session.essentials["recipe"], str(saved.path))
    check_unchanged(saved.essentials, session.essentials, str(saved.path))
    checkpoint.check_fits(saved, session.adapters, session.optimizer, session.order, session.task.criterion)


def test_a_missing_best_adapter_is_refused(halted: tuple[dict[str, Any], Path], session: Session, tmp_path: Path) -> None:
    """The best evaluation was an earlier one, whose adapter would be the result."""
    folder = shutil.copytree(Path(halted[0]["output"], "checkpoints", f"step-{STEP}"), tmp_path / f"step-{STEP}")
    (folder / "best.safetensors").unlink(missing_ok=True)
    apply(folder, "state.json", put("progress", "best_step", 3))
    with pytest.raises(ConfigError, match="the adapter of the best evaluation, at step 3, is missing"):
        resume(folder, session)
    shutil.copy(folder / "adapter.safetensors", folder / "best.safetensors")
    seal(folder)
    resume(folder, session)
    apply(folder, "best.safetensors", first("", lambda t: t[:1]))
    with pytest.raises(ConfigError, match=r"best\.safetensors does not fit"):
        resume(folder, session)


@pytest.mark.parametrize(
    "case", ["optimizer.safetensors: a parameter missing", "random.safetensors: of another kind", "state.json: step -1"]
)
def test_the_command_refuses_it_and_writes_nothing(
    halted: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    shutil.copytree(halted[0]["output"], tmp_path / "run")
    (file, change) = next((file, change) for file, what, change in CASES if f"{file}: {what}" == case)
    apply(tmp_path / "run" / "checkpoints" / f"step-{STEP}", file, change)
    recipe = str(write_recipe(tmp_path, halted[0] | {"output": str(tmp_path / "run")}))
    before = tree(tmp_path)
    for options in ([], ["--dry-run"]):
        assert main(["train", recipe, "--resume", *options]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and f"step-{STEP}" in said
    assert tree(tmp_path) == before


def test_the_state_before_a_first_gradient_is_that_of_adamw() -> None:
    """A parameter without a gradient is saved as AdamW would start it, so that a missing one is noticed."""
    from byway.train.optim import _blank

    parameter = torch.nn.Parameter(torch.randn(3, 2))
    adamw = torch.optim.AdamW([parameter], lr=0.0)
    (parameter * 0).sum().backward()
    adamw.step()
    after = adamw.state[parameter]
    blank = _blank(parameter)
    assert blank.keys() == after.keys() and int(after["step"]) == 1 and int(blank["step"]) == 0
    for name, tensor in blank.items():
        assert (tensor.dtype, tensor.shape, tensor.device) == (after[name].dtype, after[name].shape, after[name].device)
        assert name == "step" or torch.equal(tensor, after[name])


# ---------------------------------------------------------------- removals


def test_a_removal_that_was_cut_short_is_finished_by_the_next_checkpoint(make_recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the removal of step 1; another version left an unsealed step 2."""
    recipe = make_recipe(train={"save_every": 1, "keep_checkpoints": 2})
    folder = Path(recipe["output"]) / "checkpoints"

    def killed(entry: Path) -> None:
        next(entry.glob("*.safetensors")).unlink()
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "remove", killed)
        train(recipe)
    left = sorted(entry.name for entry in folder.iterdir())
    assert left[1:] == ["step-2", "step-3"] and left[0].startswith(".step-1.byway-")

    def unsealed(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 4:
            (folder / "step-3" / "complete.json").unlink()

    finished = train(recipe, resume=True, on_event=unsealed)
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-5", "step-6"]
    assert_same_run(train(make_recipe("whole", train={"save_every": 1, "keep_checkpoints": 2})).directory, finished.directory)


def test_leftovers_are_swept_at_the_start_and_nothing_else_is(make_recipe: RecipeMaker) -> None:
    recipe = make_recipe(train={"save_every": 1, "keep_checkpoints": 2})
    with pytest.raises(Stopped):
        train(recipe, on_event=interrupt_at(3))
    folder = Path(recipe["output"]) / "checkpoints"
    for name in ("step-1", ".step-2.byway-00000000-1-aa", "step-50"):
        (folder / name).mkdir()
        (folder / name / "adapter.safetensors").touch()
    (folder / ".step-9.byway-00000000-1-bb").touch()
    for name in ("notes", "step-x", ".hidden"):
        (folder / name).mkdir()
    (folder.parent / "step-7").mkdir()  # not in the folder of checkpoints

    def watch(event: Event) -> None:
        if isinstance(event, Stepped):
            there = sorted(entry.name for entry in folder.iterdir())
            assert there == [".hidden", "notes", "step-2", "step-3", "step-x"]
            raise KeyError

    with pytest.raises(KeyError):
        train(recipe, resume=True, on_event=watch)
    assert (folder.parent / "step-7").is_dir()
