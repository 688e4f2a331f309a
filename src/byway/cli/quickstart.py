"""``byway quickstart``: what a newcomer sees first, drawn."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui
from byway.errors import ConfigError

if TYPE_CHECKING:
    from byway.cli._quickstart.measure import Score
    from byway.cli._quickstart.result import Result
    from byway.cli.train import Watch
    from byway.recipe.recipe import Recipe
    from byway.train.reporting.events import Event

__all__ = ["run"]

_DEFAULT = Path("runs/quickstart")
_STAGES = {
    "before": "1/4 before: what the bare model answers to rows it will not be trained on",
    "training": "2/4 training",
    "after": "3/4 after: the same rows again, with the adapter",
    "merging": "4/4 merging: the adapter folded into a copy of the model, read back and compared",
}


def run(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where everything goes.")] = _DEFAULT,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="So many steps only: a short trial.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted quickstart.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the quickstart that is in the output directory.")] = False,
) -> int:
    """Fine-tune a small chat model on rows that ship with byway: measured before and after, then merged. About ten minutes on two cores."""
    from byway.cli._quickstart.run import quickstart
    from byway.train import Stopped

    recipe = _recipe(output, seed, steps, resume=resume)
    with ExitStack() as stack:
        watch = _Drawn(stack, recipe)
        try:
            result = quickstart(recipe, overwrite=overwrite, resume=resume, on_event=watch)
        except Stopped as stopped:
            watch.close()
            ui.note(str(stopped))
            if stopped.checkpoint is not None:
                ui.note(f"to go on from there: {_command('quickstart', '--resume', '-o', output)}")
            return stopped.exit_code
    _conclude(result)
    return 0


def _recipe(output: Path, seed: int | None, steps: int | None, *, resume: bool) -> Recipe:
    """The packaged recipe, or that of the run to be resumed."""
    from byway.cli._quickstart.run import packaged_recipe
    from byway.recipe.recipe import Recipe

    if not resume:
        return packaged_recipe(output, seed=seed, steps=steps)
    if seed is not None or steps is not None:
        raise ConfigError(
            "--seed and --steps do not go with --resume: the run keeps its own", "leave them out, or start anew with --overwrite"
        )
    file = output / "recipe.yaml"
    if not file.is_file():
        raise ConfigError(f"{output} holds no quickstart to resume: there is no {file}", "start it without --resume")
    return Recipe.load(file, [f"output={_quoted(str(output))}"])


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------- while it runs


def _introduce(recipe: Recipe) -> None:
    """What will be done, and with what."""
    from byway.cli._quickstart import measure
    from byway.cli._quickstart.result import PARTS
    from byway.cli._quickstart.run import name_of

    example = measure.examples(1)[0]
    ui.note(ui.paint("The job: a customer's message in, one line of JSON out", "bold", sys.stderr))
    ui.note(f"  message  {example.message}")
    ui.note(f"  answer   {example.answer}")
    ui.note(f"model: {name_of(recipe)}")
    ui.note(f"rows:  {len(measure.read('train'))} to learn from, and two parts that are only measured on:")
    for part, meaning in PARTS.items():
        ui.note(f"  {part:<9}{len(measure.read(part))} rows, {meaning}")


class _Drawn:
    """Draws the events of a quickstart; those of its training as `byway train` does."""

    def __init__(self, stack: ExitStack, recipe: Recipe) -> None:
        from byway.cli.train import watching

        self.recipe = recipe
        self.introduced = False
        self.training: Watch = stack.enter_context(watching())
        self.own = stack.enter_context(ExitStack())
        self.bar: ui.Progress | None = None

    def __call__(self, event: Event) -> None:
        from byway.cli._quickstart import run as quickstart

        match event:
            case quickstart.Began(stage):
                if not self.introduced:  # here, since by now nothing has been refused
                    _introduce(self.recipe)
                    self.introduced = True
                ui.note("\n" + ui.paint(_STAGES[stage], "bold", sys.stderr))
            case quickstart.Answering(setting, done, total):
                if self.bar is None:
                    self.bar = self.own.enter_context(ui.progress(total, _ANSWERING[setting]))
                self.bar.update(done)
            case quickstart.Measured(_, scores):
                self.close()
                ui.note("exact match: " + ", ".join(f"{score.exact:.2f} on {part}" for part, score in scores.items()))
            case quickstart.Merging(done, total):
                if done == total:
                    ui.note(f"{total} tensors written; reading them back")
            case _:
                self.training(event)

    def close(self) -> None:
        """Take the bar of the answers away."""
        self.own.close()
        self.bar = None


_ANSWERING = {
    "before": "answers (instruction alone)",
    "before_with_examples": "answers (two examples)",
    "after": "answers (with the adapter)",
}


# ---------------------------------------------------------------- at the end


def _conclude(result: Result) -> None:
    ui.note("")
    _scores(result)
    _samples(result)
    _places(result)
    _next(result.directory)


def _scores(result: Result) -> None:
    from byway.cli._quickstart.result import PARTS, SETTINGS

    scores = result.scores
    rows = [_score_row(what, part, scores[setting][part]) for part in PARTS for setting, what in SETTINGS.items()]
    ui.table("Share of right answers", ["part", "measured", "exact match", "valid JSON", "intent", "order", "name"], rows)
    ui.out()
    ui.out("before: the bare model, given the instruction alone, or two worked examples besides; after: the instruction alone")
    for part, meaning in PARTS.items():
        ui.out(f"{part}: {meaning}")
    ui.out("exact match: the whole answer is right. held_out also chose which epoch's adapter was kept; hard was never looked at.")
    ui.out("The instruction does not name the six intents (two examples show two): before training, look at order and name.")


def _score_row(what: str, part: str, score: Score) -> list[str]:
    return [part, what, *(f"{value:.3f}" for value in (score.exact, score.valid, *score.fields.values()))]


def _samples(result: Result) -> None:
    """Each answer on a line of its own; line breaks inside are shown as ⏎."""
    from byway.cli._quickstart.result import SETTINGS

    ui.out("\nThree answers (the first rows, not chosen by result)")
    for sample in result.samples:
        ui.out(f"\n{sample.part}: {sample.row.message}")
        ui.out(f"    {'wanted':<19}{sample.row.answer}")
        for setting, (answer, right) in sample.answers.items():
            ui.out(f"  {'✓' if right else '✗'} {SETTINGS[setting]:<19}{answer.strip().replace(chr(10), ' ⏎ ')}")


def _places(result: Result) -> None:
    directory, certificate = result.directory, result.certificate
    ui.out()
    if certificate is not None:
        for line in certificate.lines():
            ui.out(line)
        ui.out()
    metrics, seconds = result.metrics, result.seconds
    took = ", ".join(f"{stage} {ui.duration(seconds[stage])}" for stage in _STAGES if stage in seconds)
    ui.out(f"{metrics['step']} steps on {metrics['tokens']:,} tokens; {took}; in all {ui.duration(seconds['total'])}")
    rows = [
        (directory / "adapter", "the trained adapter, in the format of HF peft"),
        (directory / "loss.png", "the loss curve"),
        (directory / "report.html", "the run on one page"),
        (directory / "recipe.yaml", "every setting, to repeat or change"),
        (directory / "metrics.jsonl", "the numbers of every step"),
        (directory / "merged", "a plain model directory, for transformers and other programs; certificate.md is in it"),
        (directory / "quickstart.json", "these scores, and every answer"),
    ]
    ui.table("Where everything lies", ["path", "what"], rows)


def _next(directory: Path) -> None:
    """Commands that work as they stand."""
    from byway.cli._quickstart import measure

    instruction = measure.read("train")[0].instruction
    message = "Hello, order 40718 still is not here. Could you look into it? Ada Fernley"
    ui.out("\nWhat to try next")
    recipe = directory / "recipe.yaml"
    smaller, reseeded = (directory.with_name(f"{directory.name}-{end}") for end in ("rank-4", "seed-1"))
    asked = ("--system", instruction, "--prompt", message, "--max-new-tokens", 40)
    for what, command in (
        ("talk to it (/both shows the bare model beside it)", _command("chat", directory, "--system", instruction)),
        ("one answer, with and without the adapter", _command("generate", directory, "--compare", *asked)),
        ("measure it again", _command("eval", directory, "--generate", "--limit", 10)),
        ("see the rows as the model sees them", _command("data", recipe)),
        ("what is in the adapter", _command("inspect", directory / "adapter")),
        ("a smaller adapter", _command("train", recipe, "method.rank=4", f"output={smaller}")),
        ("another seed", _command("quickstart", "--seed", 1, "-o", reseeded)),
    ):
        ui.out(f"  {command}")
        ui.out(f"      {what}")
    ui.out(f"  your own rows: copy {recipe}, change data.train, data.eval and output, then byway data and byway train")


def _command(*words: object) -> str:
    """A command line that a shell reads as these words."""
    return shlex.join(["byway", *map(str, words)])
