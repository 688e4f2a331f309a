"""A table of the modules that an adapter covers, which shows targets that reach only some of the layers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from byway.core.families.facts import inside
from byway.core.method import Attached
from byway.core.slots import base_modules, side_paths

__all__ = ["frozen_parameters", "summarize"]

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass
class _Row:
    """Modules that differ only in the number of their layer."""

    there: int = 0
    adapted: int = 0
    parameters: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)


def _pattern(path: str) -> str:
    """Replace layer numbers: ``model.layers.3.mlp.up_proj`` → ``model.layers.*.mlp.up_proj``."""
    return _INDEX.sub(".*", f".{path}")[1:]


def summarize(adapter: Attached) -> str:
    """Return the number of trainable parameters, then a row a kind of module: adapted/total, parameters, side paths."""
    rows = _rows(adapter)
    trained, frozen = adapter.num_parameters, frozen_parameters(adapter.model)
    share = 100 * trained / (frozen + trained) if frozen + trained else 0.0
    head = f"{adapter.name}: {type(adapter.method).__name__}, {trained:,} trainable parameters, {frozen:,} frozen ({share:.3f}%)"
    width = max((len(name) for name in rows), default=0)
    lines = [head]
    for name, row in rows.items():
        kinds = ", ".join(f"{kind} ×{n}" if n != row.adapted else kind for kind, n in row.kinds.items())
        more = f", … {len(row.missing) - 3} more" if len(row.missing) > 3 else ""
        uneven = "" if row.adapted == row.there else f"  ← not all: {', '.join(row.missing[:3])}{more}"
        lines.append(f"  {name:<{width}}  {row.adapted:>3}/{row.there:<3} {row.parameters:>12,}  {kinds}{uneven}")
    return "\n".join([*lines, *(f"  note: {note}" for note in adapter.notes)])


def frozen_parameters(model: nn.Module) -> int:
    """Count the base's parameters in use: without those of modules whose trained copy answers instead."""
    copied = [site.path for site, _, side in side_paths(model) if side.overrides("instead")]
    modules = [module for path, module in base_modules(model) if not any(inside(path, root) for root in copied)]
    return sum(p.numel() for p in {id(p): p for module in modules for p in module._parameters.values() if p is not None}.values())


def _rows(adapter: Attached) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    adapted: set[str] = set()
    for site, side in adapter.side_paths():
        row = rows.setdefault(_pattern(site.path) or "(the model itself)", _Row())
        row.adapted += site.path not in adapted
        adapted.add(site.path)
        row.parameters += sum(p.numel() for p in side.parameters())
        row.kinds[type(side).__name__] += 1
    for path, _ in base_modules(adapter.model):
        row = rows.get(_pattern(path) or "(the model itself)")
        if row is not None:
            row.there += 1
            if path not in adapted:
                row.missing.append(path)
    return rows
