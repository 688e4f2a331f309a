"""``byway train RECIPE``: run a recipe, with progress on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byway.cli import ui
from byway.cli._options import Overrides, RecipeFile, SkipBadRows
from byway.errors import ConfigError

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe
    from byway.train.loop import Run
    from byway.train.plan.plan import Plan
    from byway.train.reporting.events import Event

__all__ = ["Watch", "run"]

_ANSWERS = 2
"""Answers before and after training that are shown after a chat run."""
_LONGEST_ANSWER = 64
"""Tokens."""


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the full recipe and the plan. Write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    skip_bad_rows: SkipBadRows = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", hidden=True)] = False,
    nproc: Annotated[int | None, typer.Option("--nproc", hidden=True)] = None,
) -> int:
    """Fine-tune a base model as described by a recipe. Prints the run's directory to stdout."""
    from byway.recipe.recipe import Recipe

    for option, given in (("--find-lr", find_lr), ("--nproc", nproc is not None)):
        if given:
            raise ConfigError(f"{option} does not exist yet", f"leave {option} out")
    options = [*(overrides or []), *(["data.skip_bad_rows=true"] if skip_bad_rows else [])]
    loaded = Recipe.load(recipe, options)
    if dry_run:
        _show(loaded, resume=resume, overwrite=overwrite)
        return 0
    from byway.train import Stopped, train

    try:
        with closing(Watch()) as watch:
            result = train(loaded, resume=resume, overwrite=overwrite, on_event=watch)
    except Stopped as stopped:
        ui.note(str(stopped))
        if stopped.checkpoint is not None:
            ui.note(f"Continue with: {shlex.join(['byway', 'train', str(recipe), *options, '--resume'])}")
        return stopped.exit_code
    if answers := _answers(result):
        from byway.train.reporting.report import add_answers

        add_answers(result.directory, answers)
        for answer in answers:
            ui.note("")
            for name, text in answer.items():
                ui.note(f"{name:<9}{text}")
    ui.out(str(result.directory))
    return 0


def _answers(result: Run) -> list[dict[str, str]]:
    """Let the bare base and the trained model answer the first rows of a chat: held-out ones if there are any."""
    from byway.core.attach import disabled
    from byway.data.documents import Conversation
    from byway.data.preview import printable
    from byway.inference.evaluate import exact_match

    held_out = result.task.documents if result.task.held_out is None else result.task.held_out
    rows = (row for row in held_out.items if isinstance(row, Conversation) and not row.unusable())
    chats = [row for row in rows if row.messages[-1]["content"].strip()][:_ANSWERS]
    if not chats or result.tokenizer is None:
        return []
    options: dict[str, Any] = {"max_new_tokens": _LONGEST_ANSWER, "batch_size": _ANSWERS}
    after = exact_match(result.model, result.tokenizer, chats, **options).answers
    with disabled(result.model):
        before = exact_match(result.model, result.tokenizer, chats, **options).answers
    return [
        {
            "question": printable(chat.messages[-2]["content"]),
            "expected": printable(one.reference),
            "before": printable(one.answer) or "(nothing)",
            "after": printable(other.answer) or "(nothing)",
        }
        for chat, one, other in zip(chats, before, after, strict=True)
    ]


def _show(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Print the resolved recipe and what it would do."""
    from byway.train.setup import prepare, threads

    with threads(recipe.train.threads):
        session = prepare(recipe, resume=resume, overwrite=overwrite, dry_run=True, note=ui.note)
    ui.out(f"{recipe.to_yaml().rstrip()}\n\n{session.plan.summary}\n")
    for line in _table(session.plan):
        ui.out(line)
    ui.out(f"{'levers':<8} {session.plan.levers}")
    ui.note("This was a dry run: nothing was written.")


def _headline(metrics: Mapping[str, Any]) -> str:
    """Return the result in a line: the evaluation beside the bare base's, and the training loss."""

    def number(name: str) -> str:
        return "not finite" if metrics.get(name) is None else f"{metrics[name]:.4f}"

    names = [name for name in ("loss", "accuracy") if f"base_{name}" in metrics]
    parts = [f"evaluation {name} {number(f'eval_{name}')} (bare base {number(f'base_{name}')})" for name in names]
    return "; ".join([*parts, f"mean training loss of the last epoch {number('epoch_loss')}"])


def _table(plan: Plan) -> list[str]:
    """Return the plan in lines: names, and what they are."""
    rows = [*plan.parts().items(), *(("rows", line) for line in plan.details)]
    return [f"{name:<8} {value}" for name, value in rows]


class Watch:
    """Show the events of a run: the plan, a progress bar, evaluations, and where the results are."""

    def __init__(self) -> None:
        self.bar: ui.Progress | None = None
        self._drawn = ExitStack()

    def __call__(self, event: Event) -> None:
        from byway.train.reporting import events

        match event:
            case events.Note(text):
                self.say(text)
            case events.Planned(plan, step):
                for line in _table(plan):
                    ui.note(line)
                self.open(plan.steps, "training", start=step)
            case events.Stepped(row, _) if self.bar is not None:
                rate = row["tokens"] / row["seconds"] if row["seconds"] else None
                self.bar.update(row["step"], loss=row["loss"], tokens_per_second=rate, memory_mb=row["memory_mb"])
                if row.get("skipped"):
                    self.say(f"step {row['step']}: update skipped because the gradient is not finite")
            case events.Evaluated(row, best):
                shown = {key: row[key] for key in ("loss", "perplexity", "accuracy") if key in row}
                numbers = "  ".join(f"{key} {'not finite' if value is None else f'{value:.4f}'}" for key, value in shown.items())
                self.say(f"evaluation at step {row['step']}: {numbers}{'  (best so far)' if best else ''}")
            case events.Stopping(name):
                self.say(f"{name} received: saving a checkpoint. A second signal stops immediately.")
            case events.Finished(directory, metrics):
                self.close()
                kept = f"step {metrics['best_step']}, best evaluation" if "best_step" in metrics else f"step {metrics['step']}, last step"
                ui.note(_headline(metrics))
                ui.note(f"adapter: {directory / 'adapter'} ({kept})")
                ui.note(f"report:  {directory / 'report.html'}")
            case _:
                pass

    def open(self, total: int, what: str, *, start: int = 0) -> ui.Progress:
        """Show a progress bar."""
        self.bar = self._drawn.enter_context(ui.progress(total, what, start=start))
        return self.bar

    def say(self, text: str) -> None:
        """Print a message, above the bar if there is one."""
        (ui.note if self.bar is None else self.bar.note)(text)

    def close(self) -> None:
        """Remove the bar."""
        self._drawn.close()
        self.bar = None
