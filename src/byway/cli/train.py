"""``byway train RECIPE``: the run, as it is seen at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui
from byway.errors import ConfigError

if TYPE_CHECKING:
    from byway.recipe.recipe import Recipe
    from byway.train.reporting.events import Event

__all__ = ["Watch", "run", "watching"]


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.")] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the recipe, the modules and the plan; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output directory.")] = False,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read, and count them.")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", hidden=True)] = False,
    nproc: Annotated[int | None, typer.Option("--nproc", hidden=True)] = None,
) -> int:
    """Fine-tune a base model as a recipe says; values of the recipe can be given as key=value."""
    from byway.recipe.recipe import Recipe

    for option, given in (("--find-lr", find_lr), ("--nproc", nproc is not None)):
        if given:
            raise ConfigError(f"{option} does not exist yet", f"leave {option} out")
    options = [*(overrides or []), *(["data.skip_bad_rows=true"] if skip_bad_rows else [])]
    read = Recipe.load(recipe, options)
    if dry_run:
        return _show(read, resume=resume, overwrite=overwrite)
    from byway.train import Stopped, train

    with watching() as watch:
        try:
            result = train(read, resume=resume, overwrite=overwrite, on_event=watch)
        except Stopped as stopped:
            hint = "; --resume goes on from there" if stopped.checkpoint is not None else ""
            ui.note(f"{stopped}{hint}")
            return stopped.exit_code
    ui.out(str(result.directory))
    return 0


def _show(recipe: Recipe, *, resume: bool, overwrite: bool) -> int:
    """The resolved recipe (data, on stdout), then what it would do."""
    from byway.train.setup import prepare, threads

    with threads(recipe.train.threads):
        session = prepare(recipe, resume=resume, overwrite=overwrite, note=ui.note)
    ui.out(recipe.to_yaml().rstrip())
    ui.out()
    ui.out(session.plan.summary)
    ui.out()
    for name, value in session.plan.parts().items():
        ui.out(f"{name:<8} {value}")
    for line in session.plan.details:
        ui.out(f"data     {line}")
    ui.note("dry run: nothing was written")
    return 0


class Watch:
    """Draws the events of a run: the plan line, a progress bar, evaluations, where things lie."""

    def __init__(self) -> None:
        self.bar: ui.Progress | None = None
        self.drawn: AbstractContextManager[ui.Progress] | None = None

    def __call__(self, event: Event) -> None:
        from byway.train.reporting import events

        match event:
            case events.Note(text):
                self.say(text)
            case events.Planned(plan, step):
                for line in plan.details:
                    ui.note(line)
                ui.plan_line(plan.parts())
                self.drawn = ui.progress(plan.steps, "training", start=step)
                self.bar = self.drawn.__enter__()
            case events.Stepped(row, _) if self.bar is not None:
                rate = row["tokens"] / row["seconds"] if row["seconds"] else None
                self.bar.update(row["step"], loss=row["loss"], tokens_per_second=rate, memory_mb=row["memory_mb"])
                if row.get("skipped"):
                    self.say(f"step {row['step']}: the gradient is not finite; no update")
            case events.Evaluated(row, best):
                numbers = "  ".join(f"{key} {_number(row[key])}" for key in ("loss", "perplexity", "accuracy") if key in row)
                self.say(f"evaluation at step {row['step']}: {numbers}{'  (best so far)' if best else ''}")
            case events.Stopping(name):
                self.say(f"{name}: saving a checkpoint; a second signal stops at once")
            case events.Finished(directory, metrics):
                self.close()
                self.finished(directory, dict(metrics))
            case _:
                pass

    def say(self, text: str) -> None:
        """A line of talk, above the bar if there is one."""
        (ui.note if self.bar is None else self.bar.note)(text)

    def finished(self, directory: Path, metrics: dict[str, float]) -> None:
        """What was kept, and where it lies."""
        kept = f"step {metrics['best_step']}, the best evaluation" if "best_step" in metrics else f"step {metrics['step']}, the last"
        ui.note(f"adapter: {directory / 'adapter'} ({kept})")
        ui.note(f"report:  {directory / 'report.html'}")

    def close(self) -> None:
        """Take the bar away."""
        if self.drawn is not None:
            self.drawn.__exit__(None, None, None)
        self.bar = self.drawn = None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


@contextmanager
def watching() -> Iterator[Watch]:
    """Within this context a :class:`Watch` draws what it is told; whatever is still drawn is closed at the end."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.close()
