"""``byway schema``: the JSON schema of recipes, for editors and other programs."""

from __future__ import annotations

import json

from byway.cli import ui

__all__ = ["run"]


def run() -> None:
    """Print the JSON schema of recipes, with the fields of every method."""
    from byway.recipe.schema import schema

    ui.out(json.dumps(schema(), indent=2, ensure_ascii=False))
