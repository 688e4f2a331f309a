"""``byway merge``: merge an adapter into its base, as an ordinary model directory with a certificate."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from byway.cli import ui
from byway.cli._options import AllowImport, Base, Trained
from byway.cli.generate import read_prompts
from byway.errors import counted

__all__ = ["run"]


def run(
    path: Trained,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Output directory. Must be new or empty.")],
    base: Base = None,
    allow_import: AllowImport = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Store the weights as fp32, bf16 or fp16. Default: as the base stores them.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to compare on, one per line. Default: held-out rows of the run."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts to compare on.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier merge.")] = False,
) -> None:
    """Merge an adapter into its base model. The result is read back from disk and compared with base plus adapter.

    If they differ by more than rounding, the output directory is not written.
    """
    from byway.inference.runs import find

    texts = None if prompts is None else read_prompts(None, prompts)
    found = find(path, base, allow_import=allow_import)
    from byway.workshop.merge.files import merge_found

    written = count(1)

    def on_tensor(name: str, total: int) -> None:
        if next(written) == total:
            ui.note(f"{counted(total, 'tensor')} written. Reading back.")

    result = merge_found(found, output, dtype=dtype, prompts=texts, samples=samples, overwrite=overwrite, on_tensor=on_tensor)
    for line in (*result.notes, *(f"skipped {name}: {why}" for name, why in result.skipped.items())):
        ui.note(f"note: {line}")
    for line in result.certificate.lines():
        ui.note(line)
    ui.out(str(result.directory))
