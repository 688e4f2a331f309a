"""``byway data``: the rows of a recipe as the model will see them; the tokenizer is loaded, the model is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.base import load_tokenizer
from byway.cli import ui

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from byway.data.encode import Encoded
    from byway.data.labelled import EncodedLabels
    from byway.recipe.sections import Data

__all__ = ["run"]


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.")] = None,
    *,
    rows: Annotated[int, typer.Option(min=0, help="How many rows of each source to show.")] = 3,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out and count rows that cannot be read.")] = False,
) -> None:
    """Show what becomes of a recipe's rows: counts, and the first of them as tokens, what is learned between ⟦ and ⟧."""
    from byway.data.encode import shared
    from byway.recipe.recipe import Recipe

    wanted = Recipe.load(recipe, [*(overrides or ()), *(["data.skip_bad_rows=true"] if skip_bad_rows else ())])
    for note in wanted.notes:
        ui.note(note)
    tokenizer = load_tokenizer(wanted.base.model)
    data = wanted.data
    if data.task == "classification":
        train = _labelled(data, tokenizer, data.train, data.limit, data.labels)
        _show_labels("train", train, tokenizer, rows)
        if data.eval is not None:
            held_out = _labelled(data, tokenizer, data.eval, data.eval_limit, train.names)
            _show_labels("eval", held_out, tokenizer, rows)
        return
    learned = _encoded(data, tokenizer, data.train, data.limit)
    _show("train", learned, tokenizer, rows)
    if data.eval is not None:
        held_out = _encoded(data, tokenizer, data.eval, data.eval_limit)
        _show("eval", held_out, tokenizer, rows)
        if same := shared(learned, held_out):
            ui.warn(f"{same:,} rows of eval are in train too: the evaluation will flatter")


def _encoded(data: Data, tokenizer: PreTrainedTokenizerBase, source: str | tuple[str, ...], limit: int | None) -> Encoded:
    from byway.data.prepare import prepare

    return prepare(
        source if isinstance(source, str) else list(source),
        tokenizer,
        max_length=data.max_length,
        format=data.format,
        columns=data.columns,
        learn=data.learn,
        overflow=data.overflow,
        template=data.template,
        skip_bad=data.skip_bad_rows,
        limit=limit,
    )


def _labelled(
    data: Data, tokenizer: PreTrainedTokenizerBase, source: str | tuple[str, ...], limit: int | None, names: tuple[str, ...] | None
) -> EncodedLabels:
    from byway.data.labelled import encode_labelled
    from byway.data.prepare import read_documents

    documents = read_documents(
        source if isinstance(source, str) else list(source),
        format=data.format,
        columns=data.columns,
        among=("classification",),
        skip_bad=data.skip_bad_rows,
        limit=limit,
    )
    return encode_labelled(documents, tokenizer, data.max_length, names, skip_bad=data.skip_bad_rows)


def _show(part: str, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    from byway.data.preview import preview, printable

    _show_report(part, encoded.report.lines())
    for row in preview(encoded, tokenizer, rows):
        ui.out()
        ui.out(f"{row.where} ({row.format}): {row.tokens:,} tokens, {row.learned:,} learned")
        ui.out(ui.marked([(printable(span.text), span.learned, span.control) for span in row.spans]))
    ui.out()


def _show_labels(part: str, encoded: EncodedLabels, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    from byway.data.preview import printable

    _show_report(part, encoded.report.lines())
    counts = [sum(example.label == number for example in encoded.examples) for number in range(len(encoded.names))]
    ui.out(f"classes: {', '.join(f'{name} {count:,}' for name, count in zip(encoded.names, counts, strict=True))}")
    for example in encoded.examples[:rows]:
        ui.out()
        ui.out(f"{example.where}: {len(example.input_ids):,} tokens, label {encoded.names[example.label]}")
        ui.out(printable(str(tokenizer.decode(example.input_ids))))
    ui.out()


def _show_report(part: str, lines: list[str]) -> None:
    for i, line in enumerate(lines):
        ui.out(f"{part}: {line}" if i == 0 else f"  {line}")
