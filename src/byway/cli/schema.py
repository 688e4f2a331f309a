"""``byway schema``: what a recipe may hold, for editors and other programs."""

from __future__ import annotations

import json

from byway.cli import ui

__all__ = ["run"]


def run() -> None:
    """Print the recipe's JSON schema, with the fields of every method that exists."""
    from byway.recipe.schema import schema

    ui.out(json.dumps(schema(), indent=2, ensure_ascii=False))
