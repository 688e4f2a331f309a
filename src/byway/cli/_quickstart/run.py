"""The quickstart: measure, train, measure again, merge. It prints nothing; the command line draws what the observer is told.

::

    check → before (the instruction alone; two worked examples) → train → after → merge with a certificate → quickstart.json

The training is `byway.train` with ``recipe.yaml`` of this folder, which is the repository's ``recipes/quickstart.yaml``: the only thing
changed is where the rows lie.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from byway.base import BUILT_IN, load_base
from byway.cli._quickstart import measure
from byway.cli._quickstart.result import FILE, PARTS, Answers, Result, read_before, write
from byway.errors import ConfigError, RunError, listed
from byway.inference.generate import Prompt, generate_text
from byway.inference.runs import find
from byway.recipe.checks import RUN_FILES, check_paths
from byway.recipe.recipe import Recipe
from byway.train import train
from byway.train.directory import inspect
from byway.train.reporting.events import Event, Observer, Saved
from byway.workshop.merge.files import CERTIFICATE, merge_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MERGED", "RECIPE", "Answering", "Began", "Measured", "Merging", "name_of", "packaged_recipe", "quickstart"]

RECIPE = Path(__file__).parent / "recipe.yaml"
MERGED = "merged"
EXAMPLES = 2
BATCH = 40
"""Rows answered at once: one step for 40 rows costs about four times one for a single row."""
NEEDED_BYTES = 800 * 10**6
TITLE = "SmolLM2-135M-Instruct (Q4_1, dequantized)"


@dataclass(frozen=True)
class Began(Event):
    """A stage begins: ``before``, ``training``, ``after`` or ``merging``."""

    stage: str


@dataclass(frozen=True)
class Answering(Event):
    """`done` of `total` rows have an answer."""

    setting: str
    done: int
    total: int


@dataclass(frozen=True)
class Measured(Event):
    """All parts have been answered in this setting."""

    setting: str
    scores: dict[str, measure.Score]


@dataclass(frozen=True)
class Merging(Event):
    """`done` of `total` tensors are written; after the last one they are read back and compared."""

    done: int
    total: int


def packaged_recipe(output: str | Path = "runs/quickstart", *, seed: int | None = None, steps: int | None = None) -> Recipe:
    """The recipe that ships with the package, on the rows that ship with it. `seed`, `steps`: in place of its own."""
    chosen = {"train.seed": seed, "train.max_steps": steps}
    values = {"data.train": str(measure.path("train")), "data.eval": str(measure.path("held_out")), "output": str(output)}
    values |= {key: value for key, value in chosen.items() if value is not None}
    return Recipe.load(RECIPE, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()])


def name_of(recipe: Recipe) -> str:
    """What the base's weights are called: the built-in ones are not the original's."""
    return TITLE if recipe.base.model == BUILT_IN else recipe.base.model


def quickstart(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, on_event: Observer | None = None) -> Result:
    """Run all of it; everything lies in the recipe's output directory afterwards.

    Args:
        recipe: of :func:`packaged_recipe`; another base may be set in it.
        overwrite: replace an earlier quickstart in the output directory.
        resume: go on with an interrupted one; what was measured before training is kept.
        on_event: told what happens: the events above and those of :mod:`byway.train.reporting.events`.

    Raises:
        ConfigError: found before anything is written.
        RunError: failed midway, or the merged model is not the base with its adapter.
        Stopped: interrupted while training, with a complete checkpoint.
    """
    tell = on_event or _nobody
    directory = Path(recipe.output).expanduser()
    before = _check(recipe, directory, overwrite=overwrite, resume=resume)
    result = Result(directory=directory, base=name_of(recipe), answers=before)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    if not before:
        with _stage("before", tell, seconds):
            result = replace(result, answers=_before(recipe, tell))
    _make_room(directory, resume=resume)

    def watch(event: Event) -> None:
        if isinstance(event, Saved) and not (directory / FILE).is_file():
            write(result)
        tell(event)

    with _stage("training", tell, seconds):
        run = train(recipe, resume=resume, overwrite=overwrite, on_event=watch)
    with _stage("after", tell, seconds):
        after = _answers(run.model, run.tokenizer, "after", 0, tell)
    metrics = run.metrics
    del run
    gc.collect()  # the merge holds models of its own
    with _stage("merging", tell, seconds):
        merge = merge_found(find(directory), directory / MERGED, overwrite=True, on_tensor=_counting(tell))
    seconds["total"] = time.perf_counter() - began
    result = replace(
        result,
        answers={**result.answers, "after": after},
        metrics=metrics,
        seconds=seconds,
        merged=merge.directory,
        certificate=merge.certificate,
    )
    write(result)
    return result


def _nobody(event: Event) -> None:
    pass


@contextmanager
def _stage(name: str, tell: Observer, seconds: dict[str, float]) -> Iterator[None]:
    tell(Began(name))
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def _counting(tell: Observer) -> Callable[[str, int], None]:
    done = 0

    def on_tensor(name: str, total: int) -> None:
        nonlocal done
        done += 1
        tell(Merging(done, total))

    return on_tensor


# ---------------------------------------------------------------- before work starts


def _check(recipe: Recipe, directory: Path, *, overwrite: bool, resume: bool) -> dict[str, Answers]:
    """What was answered before training by the quickstart that is resumed; ConfigError for what cannot be done."""
    if overwrite and resume:
        raise ConfigError("--resume and --overwrite contradict each other", "choose one")
    entries = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")} if directory.is_dir() else set[str]()
    own = {name for name in (FILE, MERGED) if name in entries and (name == FILE or (directory / name / CERTIFICATE).is_file())}
    foreign = entries - own - RUN_FILES
    if foreign:
        raise ConfigError(f"{directory} holds files that are not a quickstart's: {listed(foreign, 5)}", "choose another directory with -o")
    before: dict[str, Answers] = {}
    if resume:
        before, finished = read_before(directory)
        if finished:
            raise ConfigError(f"the quickstart in {directory} has finished: there is nothing to resume", "--overwrite makes it again")
    elif own and not overwrite:
        hint = "--resume goes on with it if it was interrupted, --overwrite replaces it, or choose another directory with -o"
        raise ConfigError(f"{directory} already holds a quickstart", hint)
    if own and overwrite:
        check_paths(recipe, resume=True)  # `inspect` would refuse what only a quickstart writes
    else:
        inspect(recipe, resume=resume, overwrite=overwrite)
    _check_space(directory)
    return before


def _check_space(directory: Path) -> None:
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{parent} has {free / 1e6:,.0f} MB free; the adapter, its checkpoints and the merged model take {NEEDED_BYTES / 1e6:,.0f} MB",
            "choose a directory on another disk with -o",
        )


def _make_room(directory: Path, *, resume: bool) -> None:
    """Take away what `train` does not know and would refuse: the merged model, and unless it goes on, the scores."""
    try:
        if (directory / MERGED / CERTIFICATE).is_file():
            shutil.rmtree(directory / MERGED)
        if not resume:
            (directory / FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot clear {directory}: {error.strerror} ({error.filename})", "choose another directory with -o") from error


# ---------------------------------------------------------------- answers


def _before(recipe: Recipe, tell: Observer) -> dict[str, Answers]:
    """What the bare base answers, as the training will load it."""
    device = None if recipe.base.device == "auto" else recipe.base.device
    base = recipe.base
    model, tokenizer = load_base(base.model, base.dtype, base.quantize, task="causal_lm", device_map=device, compute=base.compute)
    return {
        "before": _answers(model, tokenizer, "before", 0, tell),
        "before_with_examples": _answers(model, tokenizer, "before_with_examples", EXAMPLES, tell),
    }


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, setting: str, examples: int, tell: Observer) -> Answers:
    """Greedy answers to every row of both parts, with so many worked examples before each."""
    rows = {part: measure.read(part) for part in PARTS}
    shown = measure.examples(examples)
    prompts: dict[str, list[Prompt]] = {part: [measure.prompt(row, shown) for row in each] for part, each in rows.items()}
    total = sum(map(len, prompts.values()))
    longest = _longest(tokenizer, [row.answer for each in rows.values() for row in each])
    found: dict[str, tuple[str, ...]] = {}
    tell(Answering(setting, 0, total))
    for part, asked in prompts.items():
        done = sum(map(len, found.values()))
        found[part] = tuple(
            generate_text(
                model,
                tokenizer,
                asked,
                max_new_tokens=longest,
                batch_size=BATCH,
                on_batch=lambda now, _, before=done: tell(Answering(setting, before + now, total)),
            )
        )
    tell(Measured(setting, {part: measure.score(answers, rows[part]) for part, answers in found.items()}))
    return found


def _longest(tokenizer: PreTrainedTokenizerBase | None, references: list[str]) -> int:
    """Half as many tokens again as the longest right answer: room for one with spaces, which is as right."""
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so no answer can be generated", "use a base with a tokenizer and a chat template")
    return math.ceil(1.5 * max(len(ids) for ids in tokenizer(references, add_special_tokens=False).input_ids))
