"""Say which parts of a composite model (vision, audio, language) are adapted, and which of them a run never reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from byway.core.adapter import Adapter
from byway.core.families import facts, inside
from byway.core.families.detect import pretrained_models
from byway.core.modes import evaluating
from byway.core.slots import base_modules

__all__ = ["describe_towers"]


def describe_towers(model: nn.Module, adapters: Sequence[Adapter], run: Callable[[], Any]) -> list[str]:
    """Return notes on a model of several parts; none for other models.

    `run` is one forward pass on the run's own rows. What it does not reach gets no gradient in training.
    """
    found = facts(model)
    if len(found.stacks) < 2 or found.kind == "encoder-decoder":
        return []
    sites: dict[str, int] = {}  # path → trainable parameters
    for adapter in adapters:
        for site, side in adapter.side_paths():
            sites[site.path] = sites.get(site.path, 0) + sum(p.numel() for p in side.parameters() if p.requires_grad)
    models = pretrained_models(dict(base_modules(model)))
    parts = {name: max((path for path in models if inside(runner, path)), key=len) for name, runner in found.stack_modules.items()}
    order = sorted(parts, key=lambda name: -len(parts[name]))  # the innermost part first
    home = {path: next((name for name in order if inside(path, parts[name])), path) for path in sites}
    counts = {name: sum(part == name for part in home.values()) for name in dict.fromkeys(home.values())}
    ran: set[str] = set()
    places = {name: parts.get(name, name) for name in counts}
    handles = [model.get_submodule(path).register_forward_hook(lambda *_, key=key: ran.add(key)) for key, path in places.items()]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    notes = ["adapted parts: " + ", ".join(f"{name} ({count} module{'s' * (count != 1)})" for name, count in counts.items())]
    missed = [name for name in counts if name not in ran]
    if missed:
        lost = sum(count for path, count in sites.items() if home[path] in missed)
        notes.append(
            f"not run on these rows: {', '.join(missed)}; {lost:,} trainable parameters never receive a gradient "
            "(layers: language-model adapts the language model only)"
        )
    return notes
