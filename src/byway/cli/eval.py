"""``byway eval``: evaluate a run on held-out rows, with and without its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from byway.cli import ui
from byway.cli._options import AllowImport, Stop, TemplateVariables, variables
from byway.errors import ConfigError, counted

__all__ = ["run"]


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or of a checkpoint or an adapter in one.")],
    *,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Evaluate on these rows. Default: the run's held-out rows.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N rows.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Generate answers, too, and count exact matches.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --generate: the base model answers, too. (Its metrics are always shown.)")
    ] = False,
    show: Annotated[int, typer.Option(metavar="N", min=0, help="With --generate: number of answers to show.")] = 3,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="With --generate: number of rows answered at once.")] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --generate: maximum length of an answer. Default: 1.5 times the longest reference."),
    ] = None,
    stop: Stop = None,
    template_variable: TemplateVariables = None,
    plain: Annotated[bool, typer.Option("--plain", help="Turn off all optimizations: padded rows, all logits. For comparison.")] = False,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Base model, instead of the one that the run names.")] = None,
    allow_import: AllowImport = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a run on held-out rows, with and without its adapter.

    Measures loss and perplexity, or accuracy, and on request the exact match of generated answers.
    """
    from byway.inference.runs import find

    if compare and not generate:
        raise ConfigError("--compare does nothing without --generate: the metrics of the base model are always shown", "add --generate")
    given = variables(template_variable)
    found = find(path, base, allow_import=allow_import)
    from byway.inference.evaluate import evaluate_run

    shown: dict[str, float] = {}

    def on_batch(what: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        if share == 1.0 or share - shown.get(what, 0.0) >= 0.25:
            shown[what] = share
            ui.note(f"{what}: {done}/{total}")

    result = evaluate_run(
        found, data=data, limit=limit, generate=generate, compare=compare, batch_size=batch_size, max_new_tokens=max_new_tokens,
        stop=stop or (), template_variables=given, plain=plain, on_batch=on_batch,
    )  # fmt: skip
    if as_json:
        ui.out(json.dumps(result.to_dict(), indent=2))
        return
    for line in result.lines:
        ui.note(line)
    ui.note(f"computed: {result.computed}")
    if result.left_aside:
        ui.note(f"note: {result.left_aside}")
    rows = [[name, f"{value:.4f}", f"{result.base[name]:.4f}"] for name, value in result.adapter.items() if name in result.base]
    answers = () if result.exact is None else result.exact.answers
    if result.exact is not None:
        bare = "" if result.base_exact is None else f"{result.base_exact.share:.4f}"
        rows.append([f"exact match ({len(answers)} rows)", f"{result.exact.share:.4f}", bare])
    ui.table(f"{result.source}: {counted(result.rows, 'row')}", ["metric", "with adapter", "base model"], rows)
    for answer in answers[:show]:
        mark = "✓" if answer.right else "✗"
        ui.out(f"\n{mark} {answer.where}\n  reference: {answer.reference.strip()}\n  answer:    {answer.answer.strip()}")
