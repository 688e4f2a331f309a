"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from byway.errors import ConfigError

__all__ = [
    "AllowImport", "Base", "MaxNewTokens", "Overrides", "RecipeFile", "SamplingSeed", "SkipBadRows", "Stop", "System", "Temperature",
    "TemplateVariables", "TopP", "Trained", "variables",
]  # fmt: skip

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's, for example train.epochs=3.")
]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Skip rows that cannot be read, and count them.")]

Trained = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Directory of a run, of one of its checkpoints, or of an adapter.")]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Base model, instead of the one that the run or adapter names: directory, .gguf file or hub id."),
]
AllowImport = Annotated[
    bool, typer.Option("--allow-import", help="Run the code of classes that the run names by import path. Only if you trust its author.")
]

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="X", min=0.0, help="Sampling temperature. 0: always take the most likely token.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="If sampling: use only the most likely tokens, up to this total probability (nucleus).")
]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End an answer before this text. Can be repeated.")]
TemplateVariables = Annotated[
    list[str] | None,
    typer.Option(
        "--template-variable", metavar="NAME=VALUE", help="Variable for the chat template, such as enable_thinking=false. Can be repeated."
    ),
]
SamplingSeed = Annotated[int, typer.Option(metavar="N", help="If sampling: the random seed.")]


def variables(given: list[str] | None) -> dict[str, Any]:
    """Return template variables from NAME=VALUE options, with YAML values as in a recipe."""
    from byway.recipe.yaml12 import parse_value

    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template-variable {text!r} is not of the form NAME=VALUE", "for instance enable_thinking=false")
        found[name] = parse_value(value, f"--template-variable {text!r}")
    return found
