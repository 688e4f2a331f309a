"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AllowImport", "Base", "MaxNewTokens", "Overrides", "RecipeFile", "SamplingSeed", "SkipBadRows", "System", "Temperature", "TopP",
    "Trained",
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
SamplingSeed = Annotated[int, typer.Option(metavar="N", help="If sampling: the random seed.")]
