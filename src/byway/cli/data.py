"""``byway data``: the rows of a recipe as the model will see them. Loads the tokenizer, not the model."""

from __future__ import annotations

from typing import Annotated

import typer

from byway.cli import ui
from byway.cli._options import Overrides, RecipeFile, SkipBadRows

__all__ = ["run"]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    rows: Annotated[int, typer.Option(metavar="N", min=0, help="Number of rows to show from each source.")] = 3,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Show counts of a recipe's rows, and the first rows as the model will see them.

    Tokens in the loss are between ⟦ and ⟧.
    """
    from byway.base import load_tokenizer
    from byway.data.preview import printable
    from byway.recipe.recipe import Recipe
    from byway.tasks import load

    wanted = Recipe.load(recipe, [*(overrides or ()), *(["data.skip_bad_rows=true"] if skip_bad_rows else ())])
    for note in wanted.notes:
        ui.note(note)
    task = load(wanted.data.task)(wanted.data, seed=wanted.train.seed)
    tokenizer = load_tokenizer(wanted.base.model, wanted.base.add_tokens)
    found = task.encode(tokenizer, len(tokenizer))
    for part, report in found.reports.items():
        examples = found.train if part == "train" else found.evaluation
        first, *further = report.lines()
        ui.out(f"{part}: {first}")
        for line in further:
            ui.out(f"  {line}")
        for line in task.describe(examples):
            ui.out(line)
        for example in examples[:rows]:
            row = task.preview(example, tokenizer)
            ui.out()
            ui.out(f"{row.where}: {row.title}")
            if row.spans:
                ui.out(ui.marked([(printable(span.text), span.in_loss, span.control) for span in row.spans]))
        ui.out()
    for note in found.notes:
        ui.warn(note)
