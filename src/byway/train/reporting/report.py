"""report.html: one self-contained page about a run, for screen and print."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.core.disk.files import atomic_write_bytes, atomic_write_text
from byway.train.reporting.log import curve_png

if TYPE_CHECKING:
    from byway.data.report import DataReport
    from byway.recipe.recipe import Recipe
    from byway.train.plan.plan import Plan

__all__ = ["add_answers", "write_results"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #5c6875; --line: #d9dfe6; --panel: #f5f7f9; --page: #ffffff; --accent: #2f6db3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #37414c; --panel: #1d242c; --page: #14191f; --accent: #7fb2ea; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.5rem 4rem; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .6rem; }
p.lead { color: var(--soft); margin: 0 0 1.5rem; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 0; }
dl.tiles div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
dl.tiles dt { color: var(--soft); font-size: .8rem; }
dl.tiles dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dl.tiles small { display: block; color: var(--soft); font-size: .8rem; }
dl.answer { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .9rem; margin: 0; padding: .7rem 0;
            border-bottom: 1px solid var(--line); }
dl.answer dt { color: var(--soft); }
dl.answer dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dl.answer dd.after { color: var(--accent); }
figure { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; }
tr.kept td { color: var(--accent); font-weight: 600; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; margin: 0;
      font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
ul { margin: 0; padding-left: 1.2rem; }
details summary { cursor: pointer; color: var(--accent); margin-bottom: .5rem; }
"""


_ANSWERS = "<!-- answers -->"
"""The place of the answers, which are not known yet when the report is written."""


def add_answers(directory: Path, answers: Sequence[Mapping[str, str]]) -> None:
    """Put answers before and after training into ``report.html``: maps of what is shown (``question``) to its text."""
    path = directory / "report.html"

    def line(name: str, text: str) -> str:
        return f"<dt>{escape(name)}</dt><dd{' class=after' if name == 'after' else ''}>{escape(text)}</dd>"

    rows = "".join(f"<dl class='answer'>{''.join(line(*pair) for pair in answer.items())}</dl>" for answer in answers)
    atomic_write_text(path, path.read_text(encoding="utf-8").replace(_ANSWERS, f"<h2>Answers before and after</h2>{rows}", 1))


def write_results(
    directory: Path,
    recipe: Recipe,
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    reports: Mapping[str, DataReport],
) -> None:
    """Write ``loss.png`` and ``report.html`` into the run's directory; `rows` are those of metrics.jsonl."""
    curve = curve_png(rows, best_step=metrics.get("best_step"))
    atomic_write_bytes(directory / "loss.png", curve)
    evaluations = [row for row in rows if row.get("eval")]
    picture = base64.b64encode(curve).decode("ascii")
    methods = " and ".join(type(method).__name__ for method in recipe.method)
    lead = f"{methods} beside {plan.base}: {plan.trained:,} trainable parameters, {plan.share:.2%} of the model, {metrics['step']:,} steps."
    if "best_step" in metrics:
        lead += f" adapter/ holds step {metrics['best_step']:,}, the best {plan.criterion} on the evaluation rows."
    else:
        lead += " adapter/ holds the last step; no rows were held out."
    data = "".join(
        f"<p>{escape(name)}</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in report.lines()) + "</ul>"
        for name, report in reports.items()
    )
    parts = [
        f"<h1>{escape(directory.name)}</h1>",
        f"<p class='lead'>{escape(lead)}</p>",
        _tiles(plan, metrics),
        _ANSWERS,
        "<h2>Loss</h2>",
        f"<figure><img alt='Loss over the optimizer steps' src='data:image/png;base64,{picture}'></figure>",
        "<h2>Evaluations</h2>" + _evaluations(evaluations, metrics.get("best_step")) if evaluations else "",
        "<h2>Plan</h2>" + _table(("", ""), [*plan.parts().items(), ("levers", plan.levers)]),
        f"<h2>Data</h2>{data}",
        f"<h2>Adapted modules</h2><pre>{escape(plan.summary)}</pre>",
        "<h2>Files</h2>" + _table(("file", "contents"), _files(directory, metrics, recipe)),
        f"<h2>Recipe</h2><details><summary>Every key, with defaults</summary><pre>{escape(recipe.to_yaml())}</pre></details>",
    ]
    title = f"<title>{escape(directory.name)} - Byway</title>"
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>{title}<style>{_STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    atomic_write_text(directory / "report.html", f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n")


def _tiles(plan: Plan, metrics: Mapping[str, Any]) -> str:
    seconds = metrics["seconds"]
    names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
    shown = {f"evaluation {name}": _beside_base(metrics, name) for name in sorted(names, key=lambda name: name != "loss")}
    shown |= {
        "mean training loss, last epoch": escape(_number(metrics.get("epoch_loss"))),
        "steps": f"{metrics['step']:,}",
        "tokens seen": f"{metrics['tokens']:,}",
        "tokens per second": f"{metrics['tokens'] / seconds:,.0f}" if seconds else "-",
        "training time": f"{seconds / 60:,.1f} min" if seconds >= 90 else f"{seconds:,.1f} s",
    }
    if metrics.get("skipped_steps"):
        shown["steps skipped (gradient not finite)"] = f"{metrics['skipped_steps']:,}"
    return "<dl class='tiles'>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in shown.items()) + "</dl>"


def _beside_base(metrics: Mapping[str, Any], name: str) -> str:
    """Return a metric of the result, and the bare base's below it, as HTML."""
    own = escape(_number(metrics[f"eval_{name}"]))
    return f"{own}<small>bare base {escape(_number(metrics[f'base_{name}']))}</small>" if f"base_{name}" in metrics else own


def _evaluations(rows: Sequence[Mapping[str, Any]], best: int | None) -> str:
    names = [key for key in rows[0] if key not in ("eval", "step", "epoch", "rows", "seconds")]
    head = "".join(f"<th class='number'>{escape(name)}</th>" for name in ("step", "epoch", *names))
    body = "".join(
        f"<tr{' class=kept' if row['step'] == best else ''}><td class='number'>{row['step']:,}</td>"
        f"<td class='number'>{row['epoch']:.2f}</td>"
        + "".join(f"<td class='number'>{escape(_number(row.get(name)))}</td>" for name in names)
        + f"<td>{'kept' if row['step'] == best else ''}</td></tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}<th></th></tr></thead><tbody>{body}</tbody></table></div>"


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    titles = f"<thead><tr><th>{escape(head[0])}</th><th>{escape(head[1])}</th></tr></thead>" if any(head) else ""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<div class='scroll'><table>{titles}<tbody>{body}</tbody></table></div>"


def _files(directory: Path, metrics: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    kept = f"step {metrics['best_step']}, the best evaluation" if "best_step" in metrics else f"step {metrics['step']}, the last"
    known = {
        "adapter": f"the trained adapter ({kept})" + ("" if len(recipe.method) == 1 else ", one directory per method"),
        "recipe.yaml": "the resolved recipe: byway train recipe.yaml repeats this run",
        "metrics.jsonl": "one line per step and evaluation",
        "loss.png": "the curve above",
        "checkpoints": "byway train --resume continues from here",
        "tensorboard": "the same numbers for TensorBoard",
    }
    return [(f"{directory.name}/{name}", what) for name, what in known.items() if (directory / name).exists()]


def _number(value: object) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
