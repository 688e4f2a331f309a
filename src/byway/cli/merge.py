"""``byway merge``: base + adapter → a plain model directory, with a certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from byway.cli import ui

__all__ = ["run"]


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, a checkpoint in one, or an adapter's directory.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes; must not exist or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="The base, where run or adapter do not say it: a directory, .gguf file or hub id.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default as the base is stored.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line to compare on; default the run's held-out rows.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many prompts are compared.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier merge.")] = False,
) -> None:
    """Fold an adapter into its base. What is written is read back and compared; what does not agree is not left in place."""
    from byway.cli.generate import read_prompts
    from byway.inference.runs import find

    texts = None if prompts is None else read_prompts(None, prompts)
    found = find(path, base)
    from byway.workshop.merge.files import merge_found

    count = 0

    def on_tensor(name: str, total: int) -> None:
        nonlocal count
        count += 1
        if count == total:
            ui.note(f"{total} tensors written; reading them back")

    result = merge_found(found, output, dtype=dtype, prompts=texts, samples=samples, overwrite=overwrite, on_tensor=on_tensor)
    for line in (*result.notes, *(f"skipped {name}: {why}" for name, why in result.skipped.items())):
        ui.note(f"note: {line}")
    for line in result.certificate.lines():
        ui.note(line)
    ui.out(str(result.directory))
