"""``byway inspect``: what an adapter contains, from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui

if TYPE_CHECKING:
    from byway.workshop.inspect import AdapterFacts

__all__ = ["run"]

_SHOWN = (
    "lora_alpha", "use_rslora", "lora_dropout", "bias", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "fields",
    "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""Keys of an adapter's configuration that are shown, in this order."""


def run(
    path: Annotated[Path, typer.Argument(metavar="ADAPTER|RUN", help="Directory of an adapter or of a run.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Show an adapter's method, modules, sizes and health. The base model is not needed.

    Exit code 2 if a tensor contains NaN or infinity.
    """
    from byway.inference.runs import adapter_directories

    directories = adapter_directories(path)
    from byway.workshop.inspect import inspect_adapter

    facts = [inspect_adapter(directory) for directory in directories.values()]
    if as_json:
        ui.out(json.dumps(facts[0].to_dict() if len(facts) == 1 else [f.to_dict() for f in facts], indent=2))
    else:
        for each in facts:
            _show(each)
    return 2 if any(each.broken for each in facts) else 0


def _show(facts: AdapterFacts) -> None:
    ui.out(f"{facts.path}: {facts.method}, in the file format of {facts.format}, {facts.bytes / 1e6:,.2f} MB")
    ui.out(f"base:       {facts.base or 'not recorded'}")
    ui.out(f"parameters: {facts.parameters:,} ({', '.join(f'{n:,} {dtype}' for dtype, n in facts.dtypes.items())})")
    if facts.ranks:
        several = len(facts.ranks) > 1
        ui.out(f"rank:       {', '.join(f'{rank} (×{count})' if several else str(rank) for rank, count in facts.ranks.items())}")
    for key in _SHOWN:
        if key in facts.config and facts.config[key] != "none":
            ui.out(f"{key}: {facts.config[key]}")
    rows = [
        [name, str(count), layers, rank, f"{numbers:,}", f"{low:.3g}", f"{high:.3g}"]
        for name, count, layers, rank, numbers, low, high in facts.coverage()
    ]
    ui.table("", ["module", "count", "layers", "rank", "parameters", "smallest ‖ΔW‖", "largest ‖ΔW‖"], rows)
    ui.out(f"largest update: {facts.largest.path} ({facts.largest.norm:.3g}), smallest: {facts.smallest.path} ({facts.smallest.norm:.3g})")
    for note in facts.notes:
        ui.out(f"note: {note}")
    if facts.zero:
        ui.warn(f"{len(facts.zero)} of {len(facts.modules)} modules have an update of exactly zero: {', '.join(facts.zero[:3])}")
    if facts.broken:
        ui.warn(f"{len(facts.broken)} tensors contain NaN or infinity: {', '.join(facts.broken[:3])}")
