"""``byway quickstart``: fine-tune and merge a small chat model on built-in data, with results on the terminal."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui
from byway.cli._quickstart import measure
from byway.cli._quickstart.measure import PARTS, SETTINGS
from byway.cli.train import Watch
from byway.errors import ConfigError, counted

if TYPE_CHECKING:
    from byway.cli._quickstart.run import Result
    from byway.recipe.recipe import Recipe
    from byway.train.reporting.events import Event

__all__ = ["run"]

_DEFAULT = Path("runs/quickstart")
_STAGES = {
    "before": "1/4 before: the base model answers held-out rows",
    "training": "2/4 training",
    "after": "3/4 after: the same rows, with the adapter",
    "merging": "4/4 merging the adapter into a copy of the model; the copy is read back and compared",
}
_ANSWERING = {
    "before": "answering (instruction only)",
    "before_with_examples": "answering (two examples)",
    "after": "answering (with adapter)",
}
_SAMPLES = (("held_out", 0), ("held_out", 1), ("hard", 0))
"""The rows whose answers are shown: always the first ones, whatever the answers are."""


def run(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Output directory.")] = _DEFAULT,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Random seed, instead of the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop training after N steps, for a short trial.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted quickstart.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the quickstart in the output directory.")] = False,
) -> int:
    """Fine-tune a small chat model on data that ships with byway. Measure it before and after, then merge the adapter.

    Takes 5 to 8 minutes on two CPU cores.
    """
    from byway.cli._quickstart.run import packaged_recipe, quickstart
    from byway.recipe.recipe import Recipe
    from byway.train import Stopped

    if resume:
        if seed is not None or steps is not None:
            message = "--seed and --steps cannot be combined with --resume: the run keeps its own"
            raise ConfigError(message, "leave them out, or start over with --overwrite")
        file = output / "recipe.yaml"
        if not file.is_file():
            raise ConfigError(f"{output} contains no quickstart to resume: there is no {file}", "start it without --resume")
        recipe = Recipe.load(file, [f"output={json.dumps(str(output), ensure_ascii=False)}"])
    else:
        recipe = packaged_recipe(output, seed=seed, steps=steps)
    try:
        with closing(_Watch(recipe)) as watch:
            result = quickstart(recipe, overwrite=overwrite, resume=resume, on_event=watch)
    except Stopped as stopped:
        ui.note(str(stopped))
        if stopped.checkpoint is not None:
            ui.note(f"Continue with: {_command('quickstart', '--resume', '-o', output)}")
        return stopped.exit_code
    ui.note("")
    _show_scores(result)
    _show_samples(result)
    _show_files(result)
    _show_commands(result.directory)
    return 0


class _Watch(Watch):
    """Show the events of a quickstart. Those of its training are shown as by `byway train`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.introduced = False

    def __call__(self, event: Event) -> None:
        from byway.cli._quickstart import run as quickstart

        match event:
            case quickstart.Began(stage):
                if not self.introduced:  # at the first stage, because all checks have passed by then
                    self._introduce(quickstart.name_of(self.recipe))
                ui.note("\n" + ui.paint(_STAGES[stage], "bold", sys.stderr))
            case quickstart.Answering(setting, done, total):
                (self.bar or self.open(total, _ANSWERING[setting])).update(done)
            case quickstart.Measured(_, scores):
                self.close()
                ui.note("exact match: " + ", ".join(f"{score.exact:.2f} on {part}" for part, score in scores.items()))
            case quickstart.Merging(done, total):
                if done == total:
                    ui.note(f"{counted(total, 'tensor')} written. Reading back.")
            case _:
                super().__call__(event)

    def _introduce(self, model: str) -> None:
        """Explain the task and what it is done with."""
        self.introduced = True
        example = measure.examples(1)[0]
        ui.note(ui.paint("Task: turn a customer's message into one line of JSON", "bold", sys.stderr))
        ui.note(f"  message  {example.message}")
        ui.note(f"  answer   {example.answer}")
        ui.note(f"model: {model}")
        ui.note(f"rows:  {len(measure.read('train'))} to train on, and two held-out parts to measure on:")
        for part, meaning in PARTS.items():
            ui.note(f"  {part:<9}{len(measure.read(part))} rows, {meaning}")


def _show_scores(result: Result) -> None:
    rows, scores = [], result.scores
    for part in PARTS:
        for setting, name in SETTINGS.items():
            score = scores[setting][part]
            rows.append([part, name, *(f"{value:.3f}" for value in (score.exact, score.valid, *score.fields.values()))])
    ui.table("Share of correct answers", ["part", "measured", "exact match", "valid JSON", "intent", "order", "name"], rows)
    ui.out()
    ui.out("before: the base model, given only the instruction or two worked examples as well; after: given only the instruction")
    for part, meaning in PARTS.items():
        ui.out(f"{part}: {meaning}")
    ui.out("exact match: the whole answer is correct. held_out also selected the epoch whose adapter was kept; hard did not.")
    ui.out("The instruction does not name the six intents (two examples show two of them): before training, compare order and name.")


def _show_samples(result: Result) -> None:
    """Show each answer on one line, with line breaks as ⏎."""
    ui.out("\nThree answers (always the first rows)")
    for part, number in _SAMPLES:
        row = measure.read(part)[number]
        ui.out(f"\n{part}: {row.message}")
        ui.out(f"    {'expected':<19}{row.answer}")
        for setting, name in SETTINGS.items():
            answer = result.answers[setting][part][number]
            mark = "✓" if measure.score([answer], [row]).exact == 1.0 else "✗"
            ui.out(f"  {mark} {name:<19}{answer.strip().replace(chr(10), ' ⏎ ')}")


def _show_files(result: Result) -> None:
    ui.out()
    if result.certificate is not None:
        for line in result.certificate.lines():
            ui.out(line)
        ui.out()
    metrics, seconds = result.metrics, result.seconds
    took = ", ".join(f"{stage} {ui.duration(seconds[stage])}" for stage in _STAGES if stage in seconds)
    ui.out(f"{metrics['step']} steps on {metrics['tokens']:,} tokens; {took}; {ui.duration(seconds['total'])} in total")
    files = {
        "adapter": "the trained adapter, in HF PEFT's format",
        "loss.png": "the loss curve",
        "report.html": "the run on one page",
        "recipe.yaml": "all settings, to repeat or change",
        "metrics.jsonl": "the metrics of every step",
        "merged": "the merged model, for transformers and other programs; see certificate.md in it",
        "quickstart.json": "these scores, and all answers",
    }
    ui.table("Where everything is", ["path", "contents"], [(result.directory / name, contents) for name, contents in files.items()])


def _show_commands(directory: Path) -> None:
    """Show commands to try next, which work as they are."""
    instruction = measure.read("train")[0].instruction
    message = "Hello, order 40718 still is not here. Could you look into it? Ada Fernley"
    recipe = directory / "recipe.yaml"
    smaller, reseeded = (directory.with_name(f"{directory.name}-{end}") for end in ("rank-4", "seed-1"))
    asked = ("--system", instruction, "--prompt", message, "--max-new-tokens", 40)
    ui.out("\nWhat to try next")
    for what, command in (
        ("chat with it (/both shows the base model's answers, too)", _command("chat", directory, "--system", instruction)),
        ("one answer, with and without the adapter", _command("generate", directory, "--compare", *asked)),
        ("evaluate it again", _command("eval", directory, "--generate", "--limit", 10)),
        ("see the rows as the model sees them", _command("data", recipe)),
        ("see what the adapter contains", _command("inspect", directory / "adapter")),
        ("train a smaller adapter", _command("train", recipe, "method.rank=4", f"output={smaller}")),
        ("use another seed", _command("quickstart", "--seed", 1, "-o", reseeded)),
    ):
        ui.out(f"  {command}")
        ui.out(f"      {what}")
    ui.out(f"  To train on your own rows: copy {recipe}, change data.train, data.eval and output, then run byway data and byway train.")


def _command(*words: object) -> str:
    """Return a command line, quoted for a shell."""
    return shlex.join(["byway", *map(str, words)])
