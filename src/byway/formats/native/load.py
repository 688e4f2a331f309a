"""Load an adapter that is kept in Byway's own format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from byway.core.adapter import Adapter
from byway.core.attach import hang, planned
from byway.core.copies import TrainedCopy
from byway.core.method import BuildContext, Method
from byway.disk.files import read_json, read_safetensors
from byway.errors import AdapterError, BywayError, listed, nearest
from byway.formats.native.save import CONFIG, FORMAT, WEIGHTS, _name_of, _places, _state
from byway.formats.record import check_base, check_tensors, fill, read_record
from byway.methods import load as load_method
from byway.methods import names as method_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_adapter"]


def load_adapter(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check: bool = True,
    methods: Sequence[type[Method]] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Attach the adapter in `directory` to `model`; AdapterError for whatever is wrong, with the model then untouched."""
    file = directory / CONFIG
    method, listed_sites = _read_config(file, methods)
    tensors, metadata = read_safetensors(directory / WEIGHTS)
    recorded = read_record(metadata, tensors, directory / WEIGHTS)
    try:
        context = BuildContext(tokenizer, generator=torch.Generator(), trusted=False, filled=True)
        plan, _ = planned(model, method, context)
    except BywayError as error:
        raise AdapterError(f"{file}: {error.message}", error.hint) from error
    here = [site.path for site, _ in plan]
    if sorted(here) != sorted(listed_sites):
        gone, new = sorted(set(listed_sites) - set(here)), sorted(set(here) - set(listed_sites))
        raise AdapterError(
            f"{file}: the adapter's sites are not those of this model; missing here: {listed(gone, 10) or 'none'}; "
            f"only here: {listed(new, 10) or 'none'}"
        )
    inside = [site.path for site, side in plan if isinstance(side, TrainedCopy)]
    notes = check_base(recorded, model, inside, tokenizer, directory) if check else ()
    for place, side in _places(plan):
        side.resize({key.removeprefix(f"{place}:"): tensor for key, tensor in tensors.items() if key.startswith(f"{place}:")})
    expected = _state(plan)
    check_tensors(expected, tensors, directory / WEIGHTS)
    notes = (*notes, *fill(expected, tensors))
    return hang(model, method, name, plan, notes=notes, trainable=trainable)


def _read_config(file: Path, methods: Sequence[type[Method]]) -> tuple[Method, list[str]]:
    config = read_json(file)
    missing = [key for key in ("format", "method", "fields", "sites") if key not in config]
    if missing:
        raise AdapterError(f"{file}: the key {missing[0]!r} is missing")
    if config["format"] != FORMAT:
        raise AdapterError(f"{file}: written in format {config['format']!r}, this version of Byway reads {FORMAT}", "update Byway")
    name, values, sites = config["method"], config["fields"], config["sites"]
    if (
        not isinstance(name, str)
        or not isinstance(values, dict)
        or not isinstance(sites, list)
        or not all(isinstance(s, str) for s in sites)
    ):
        raise AdapterError(f"{file}: 'method' must be a string, 'fields' an object, 'sites' a list of strings")
    kind = _kind(file, name, methods)
    known = {f.name for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise AdapterError(f"{file}: {kind.__name__} has no field {unknown[0]!r}", nearest(unknown[0], known))
    try:
        return kind(**{key: _hashable(value) for key, value in values.items()}), sites
    except (BywayError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: {error}") from error


def _kind(file: Path, name: str, methods: Sequence[type[Method]]) -> type[Method]:
    given = {_name_of(method): method for method in methods}
    if name in given:
        return given[name]
    if name in method_names():
        return load_method(name)
    if ":" in name:
        raise AdapterError(
            f"{file}: its method is {name!r}, which is not part of Byway, and no code is imported because a file names it",
            f"import {name.rpartition(':')[2]} yourself and pass methods=({name.rpartition(':')[2]},)",
        )
    raise AdapterError(f"{file}: unknown method {name!r} (there are: {listed([*method_names(), *given])})", nearest(name, method_names()))


def _hashable(value: Any) -> Any:
    return tuple(_hashable(part) for part in value) if isinstance(value, list) else value
