"""The quickstart: measure, train, measure again, merge. It prints nothing; an observer is told what happens.

::

    check → before (instruction only; two worked examples) → train → after → merge with a certificate → quickstart.json

The training is `byway.train` on ``recipe.yaml`` in this folder, which is the repository's ``recipes/quickstart.yaml``.
Only the paths of the rows are replaced.

``quickstart.json`` is written twice: at the first checkpoint with the answers given before training, so that a resumed
quickstart need not generate them again, and at the end with everything. Scores are never read from it but computed
from the answers.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base import BUILT_IN, load_base
from byway.cli._quickstart import measure
from byway.cli._quickstart.measure import PARTS, SETTINGS, Score
from byway.core.disk.files import atomic_write_text, read_json, to_json
from byway.core.disk.lock import check_free, locked
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

    from byway.workshop.merge.certificate import Certificate

__all__ = ["Answering", "Began", "Measured", "Merging", "Result", "name_of", "packaged_recipe", "quickstart"]

RECIPE = Path(__file__).parent / "recipe.yaml"
FILE = "quickstart.json"
MERGED = "merged"
EXAMPLES = 2
BATCH = 40
"""Rows answered at once: a decoding step for 40 rows takes about four times as long as one for a single row."""
NEEDED_BYTES = 800 * 10**6
TITLE = "SmolLM2-135M-Instruct (Q4_1, dequantized)"

Answers = Mapping[str, tuple[str, ...]]
"""Part → the model's answers, in the order of its rows."""


@dataclass(frozen=True)
class Began(Event):
    """A stage begins: ``before``, ``training``, ``after`` or ``merging``."""

    stage: str


@dataclass(frozen=True)
class Answering(Event):
    """`done` of `total` rows have been answered."""

    setting: str
    done: int
    total: int


@dataclass(frozen=True)
class Measured(Event):
    """All rows have been answered in this setting. ``scores``: part → score."""

    setting: str
    scores: dict[str, Score]


@dataclass(frozen=True)
class Merging(Event):
    """`done` of `total` tensors are written. After the last one they are read back and compared."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answers and scores of a quickstart, with the metrics of its training run."""

    directory: Path
    base: str
    """Name of the weights."""
    answers: Mapping[str, Answers]
    """Setting → answers."""
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Metrics of the training run; empty until it has finished."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Stage → wall time in this process."""
    certificate: Certificate | None = None
    """Certificate of the merged model; None until the quickstart has finished."""

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """Setting → part → score."""
        return {
            setting: {part: measure.score(given, measure.read(part)) for part, given in parts.items()}
            for setting, parts in self.answers.items()
        }

    def write(self) -> None:
        """Write ``quickstart.json`` into the run's directory."""
        kept = ("passed", "stored", "prompts", "share", "max_difference", "mean_kl", "top1_agreement")
        values = {
            "finished": self.certificate is not None,
            "base": self.base,
            "parts": dict(PARTS),
            "settings": dict(SETTINGS),
            "scores": {setting: {part: asdict(score) for part, score in parts.items()} for setting, parts in self.scores.items()},
            "training": dict(self.metrics),
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "merge": None if self.certificate is None else {name: getattr(self.certificate, name) for name in kept},
            "answers": {setting: {part: list(given) for part, given in parts.items()} for setting, parts in self.answers.items()},
        }
        atomic_write_text(self.directory / FILE, to_json(values))


def packaged_recipe(output: str | Path = "runs/quickstart", *, seed: int | None = None, steps: int | None = None) -> Recipe:
    """Return the packaged recipe, with the packaged rows. `seed` and `steps` replace the recipe's values."""
    values = {"data.train": str(measure.path("train")), "data.eval": str(measure.path("held_out")), "output": str(output)}
    chosen = {"train.seed": seed, "train.max_steps": steps}
    values |= {key: value for key, value in chosen.items() if value is not None}
    return Recipe.load(RECIPE, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()])


def name_of(recipe: Recipe) -> str:
    """Return the name of the base's weights. The built-in ones are not identical to the original's."""
    return TITLE if recipe.base.model == BUILT_IN else recipe.base.model


def quickstart(recipe: Recipe, *, overwrite: bool = False, resume: bool = False, on_event: Observer | None = None) -> Result:
    """Run the whole quickstart. Everything is written to the recipe's output directory.

    Args:
        recipe: from :func:`packaged_recipe`; its base may be replaced.
        overwrite: replace an earlier quickstart in the output directory.
        resume: continue an interrupted quickstart. The answers given before training are kept.
        on_event: called with the events above and those of :mod:`byway.train.reporting.events`.

    Raises:
        ConfigError: found before anything is written.
        RunError: failed midway, or the merged model does not equal base plus adapter.
        Stopped: interrupted while training, with a complete checkpoint.
    """
    directory = Path(recipe.output).expanduser()
    _check(recipe, directory, overwrite=overwrite, resume=resume)  # before the directory is created to lock it
    with locked(directory):
        before = _check(recipe, directory, overwrite=overwrite, resume=resume)
        return _stages(recipe, directory, before, overwrite=overwrite, resume=resume, tell=on_event or (lambda _: None))


def _stages(recipe: Recipe, directory: Path, before: dict[str, Answers], *, overwrite: bool, resume: bool, tell: Observer) -> Result:
    """Run the stages in a checked and locked directory. `before`: answers that need not be generated again."""
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        tell(Began(name))
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    def watch(event: Event) -> None:
        if isinstance(event, Saved) and not (directory / FILE).is_file():
            result.write()
        tell(event)

    began = time.perf_counter()
    if not before:
        with stage("before"):
            base, device = recipe.base, recipe.base.device
            model, tokenizer = load_base(
                base.model,
                base.dtype,
                base.quantize,
                task="causal_lm",
                device_map=None if device == "auto" else device,
                compute=base.compute,
            )
            settings = {"before": 0, "before_with_examples": EXAMPLES}
            before = {setting: _answers(model, tokenizer, setting, shown, tell) for setting, shown in settings.items()}
            del model
    result = Result(directory=directory, base=name_of(recipe), answers=before)
    try:  # `train` would refuse to overwrite these
        if (directory / MERGED / CERTIFICATE).is_file():
            shutil.rmtree(directory / MERGED)
        if not resume:
            (directory / FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot clear {directory}: {error.strerror} ({error.filename})", "choose another directory with -o") from error
    with stage("training"):
        run = train(recipe, resume=resume, overwrite=overwrite, on_event=watch)
    with stage("after"):
        after = _answers(run.model, run.tokenizer, "after", 0, tell)
    metrics = run.metrics
    del run
    gc.collect()  # the merge loads models of its own
    written = count(1)
    with stage("merging"):
        merge = merge_found(
            find(directory), directory / MERGED, overwrite=True, on_tensor=lambda _, total: tell(Merging(next(written), total))
        )
    seconds["total"] = time.perf_counter() - began
    result = replace(result, answers={**before, "after": after}, metrics=metrics, seconds=seconds, certificate=merge.certificate)
    result.write()
    return result


def _check(recipe: Recipe, directory: Path, *, overwrite: bool, resume: bool) -> dict[str, Answers]:
    """Refuse what cannot work. If the quickstart is resumed, return the answers given before training.

    Raises:
        ConfigError: contradictory options, a directory that cannot be used, too little space on its disk, or a file
            that was not written by a quickstart or was written for other rows.
    """
    if overwrite and resume:
        raise ConfigError("--resume and --overwrite contradict each other", "choose one")
    check_free(directory)
    entries = {entry.name for entry in directory.iterdir() if not entry.name.startswith(".")} if directory.is_dir() else set[str]()
    own = {name for name in (FILE, MERGED) if name in entries and (name == FILE or (directory / name / CERTIFICATE).is_file())}
    foreign = entries - own - RUN_FILES
    if foreign:
        message = f"{directory} contains files that do not belong to a quickstart: {listed(foreign, 5)}"
        raise ConfigError(message, "choose another directory with -o")
    before: dict[str, Answers] = {}
    if resume:
        file = directory / FILE
        values = read_json(file, error=ConfigError) if file.is_file() else {"answers": {}, "finished": False}
        try:
            stored, finished = values["answers"], bool(values["finished"])
            for setting in SETTINGS:
                if setting in stored and setting != "after":
                    before[setting] = {part: tuple(map(str, stored[setting][part])) for part in PARTS}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{file} was not written by a quickstart: {error!r}", "start over with --overwrite") from error
        if any(len(answers[part]) != len(measure.read(part)) for answers in before.values() for part in PARTS):
            raise ConfigError(f"{file} was written for other rows than this version's", "start over with --overwrite")
        if finished:
            raise ConfigError(f"the quickstart in {directory} has finished: nothing to resume", "run it again with --overwrite")
    elif own and not overwrite:
        hint = "continue it with --resume if it was interrupted, replace it with --overwrite, or choose another directory with -o"
        raise ConfigError(f"{directory} already contains a quickstart", hint)
    if own and overwrite:
        check_paths(recipe, resume=True)  # `inspect` would refuse the files that only a quickstart writes
    else:
        inspect(recipe, resume=resume, overwrite=overwrite)
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{parent} has {free / 1e6:,.0f} MB free; adapter, checkpoints and merged model need {NEEDED_BYTES / 1e6:,.0f} MB",
            "choose a directory on another disk with -o",
        )
    return before


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, setting: str, examples: int, tell: Observer) -> Answers:
    """Generate greedy answers to all rows of both parts, with `examples` worked examples in each prompt."""
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, so it cannot generate answers", "use a base with a tokenizer and a chat template")
    rows = {part: measure.read(part) for part in PARTS}
    shown = measure.examples(examples)
    references = [row.answer for each in rows.values() for row in each]
    # half as many tokens again as the longest reference: an answer with spaces is longer, and as correct
    longest = math.ceil(1.5 * max(len(ids) for ids in tokenizer(references, add_special_tokens=False).input_ids))
    total, done = len(references), 0
    found: dict[str, tuple[str, ...]] = {}
    tell(Answering(setting, 0, total))
    for part, each in rows.items():
        prompts: list[Prompt] = [measure.prompt(row, shown) for row in each]
        answers = generate_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens=longest,
            batch_size=BATCH,
            on_batch=lambda now, _, before=done: tell(Answering(setting, before + now, total)),
        )
        found[part] = tuple(answers)
        done += len(each)
    tell(Measured(setting, {part: measure.score(answers, rows[part]) for part, answers in found.items()}))
    return found
