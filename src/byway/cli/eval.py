"""``byway eval``: a run on held-out rows, with the adapter and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui

if TYPE_CHECKING:
    from byway.inference.evaluate import Evaluation

__all__ = ["run"]


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, or a checkpoint or adapter in one.")],
    *,
    data: Annotated[str | None, typer.Option(help="Rows to measure on, instead of those the run held out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows at most.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model answer, and count exact matches.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="With --generate: the bare base's answers too.")] = False,
    show: Annotated[int, typer.Option(min=0, help="With --generate: so many answers are shown.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer; default by the references.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Padded and with all logits: what the savings must agree with.")] = False,
    base: Annotated[str | None, typer.Option(help="Another place where the base lies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure a run: loss, perplexity or accuracy, and exact match of generated answers."""
    from byway.inference.runs import find

    found = find(path, base)
    from byway.inference.evaluate import evaluate_run

    shown: dict[str, float] = {}

    def on_batch(what: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        if share == 1.0 or share - shown.get(what, 0.0) >= 0.25:
            shown[what] = share
            ui.note(f"{what}: {done}/{total}")

    result = evaluate_run(
        found,
        data=data,
        limit=limit,
        generate=generate,
        compare=compare,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        plain=plain,
        on_batch=on_batch,
    )
    if as_json:
        ui.out(json.dumps(result.to_dict(), indent=2))
        return
    _draw(result, show)


def _draw(result: Evaluation, show: int) -> None:
    for line in result.lines:
        ui.note(line)
    ui.note(f"computed: {result.computed}")
    rows = [[name, f"{value:.4f}", f"{result.base[name]:.4f}"] for name, value in result.adapter.items() if name in result.base]
    if result.exact is not None:
        other = "" if result.base_exact is None else f"{result.base_exact.share:.4f}"
        rows.append([f"exact match ({len(result.exact.answers)} rows)", f"{result.exact.share:.4f}", other])
    ui.table(f"{result.source}: {result.rows} rows", ["measure", "with the adapter", "bare base"], rows)
    if result.exact is not None:
        for answer in result.exact.answers[:show]:
            mark = "✓" if answer.right else "✗"
            ui.out(f"\n{mark} {answer.where}\n  reference: {answer.reference.strip()}\n  answer:    {answer.answer.strip()}")
