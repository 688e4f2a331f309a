"""``byway doctor RECIPE``: run one real training step and report problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from byway.cli import ui
from byway.cli._options import Overrides, RecipeFile

__all__ = ["run"]


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> int:
    """Check a recipe by running one real training step, without keeping anything. Exit code 2 if a check fails."""
    from byway.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    from byway.train.doctor import diagnose

    result = diagnose(loaded, ui.note)
    if as_json:
        ui.out(json.dumps([asdict(check) for check in result.checks], indent=2, ensure_ascii=False))
        return 0 if result.good else 2
    width = max(len(check.name) for check in result.checks)
    for check in result.checks:
        ui.out(f"{'✓' if check.good else '✗'} {check.name:<{width}}  {check.found}")
        if check.hint and not check.good:
            ui.out(f"  {'':<{width}}  → {check.hint}")
    if result.sample:
        from byway.data.preview import printable

        ui.out(f"\n{result.sample_where} as the model sees it; tokens in the loss are between ⟦ and ⟧:")
        ui.out(ui.marked([(printable(span.text), span.in_loss, span.control) for span in result.sample]).rstrip("\n"))
    bad = sum(not check.good for check in result.checks)
    ui.note(f"{bad} of {len(result.checks)} checks failed" if bad else f"all {len(result.checks)} checks passed")
    return 2 if bad else 0
