"""Byway's own format, for adapters that HF peft cannot hold.

A directory with two files (and a README) under names that peft does not look for:

``byway_adapter.json``::

    {"format": 1,
     "method": "ladder_side_tuning",          # a file of byway/methods, or "package.module:Class" for your own
     "fields": {"reduction": 8, ...},         # the method's fields; lists for tuples
     "sites":  ["model.layers.0.mlp", ...]}   # modules that have side paths, in module order; "" is the model itself

``byway_adapter.safetensors``: the ``state_dict()`` of each side path (parameters and persistent buffers, encoders
too), under ``<site>:<name>``, for instance ``model.layers.0.mlp:down.weight``; ``:prompt`` at the model itself. A
further side path at one site counts, ``<site>+1:<name>``. The metadata holds the record that ``formats/record.py``
describes: the hash of the tensors and the fingerprint of the base.

Loading rebuilds the method from its fields, compares its sites with those listed, requires every tensor with its
shape, finite and floating-point (or of exactly the expected dtype), and only then attaches. A class named by import
path is never imported because a file says so: pass it in ``methods``, or allow it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.attach import planned
from byway.core.copies import TrainedCopy
from byway.core.disk.files import read_json, read_safetensors, to_json
from byway.core.fields import plain
from byway.core.method import Attached, BuildContext, Method
from byway.core.slots import SidePath, Site
from byway.errors import AdapterError, BywayError, listed, nearest
from byway.formats.directory import README, write
from byway.formats.format import Format, Loaded, LoadOptions
from byway.formats.record import check_base, check_tensors, errors_in, fill, make_record, read_record
from byway.methods import load as load_method
from byway.methods import names as method_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONFIG", "WEIGHTS", "Native"]

CONFIG, WEIGHTS = "byway_adapter.json", "byway_adapter.safetensors"
FORMAT = 1


class Native(Format):
    """``byway_adapter.json`` and ``byway_adapter.safetensors``; holds every method, so it is asked last."""

    order = 30
    files = (CONFIG, WEIGHTS)
    label = "byway"

    def read_config(self, directory: Path) -> dict[str, Any]:
        file = directory / CONFIG
        config = read_json(file)
        missing = [key for key in ("format", "method", "fields", "sites") if key not in config]
        if missing:
            raise AdapterError(f"{file}: the key {missing[0]!r} is missing")
        if config["format"] != FORMAT:
            raise AdapterError(f"{file}: written in format {config['format']!r}, this version of Byway reads {FORMAT}", "update Byway")
        sites = config["sites"]
        paths = isinstance(sites, list) and all(isinstance(site, str) for site in sites)
        if not (isinstance(config["method"], str) and isinstance(config["fields"], dict) and paths):
            raise AdapterError(f"{file}: 'method' must be a string, 'fields' an object, 'sites' a list of strings")
        return config

    def declines(self, adapter: Attached) -> str:
        return ""

    def save(self, adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        installed, method = adapter.side_paths(), adapter.method
        declined = "" if method.peft is None else method.peft.declines(method, adapter.model, installed)
        why = declined or "HF peft has no name for this method"
        tensors = _state(installed)
        try:
            config = to_json(
                {
                    "format": FORMAT,
                    "method": _name_of(type(method)),
                    "fields": {f.name: plain(getattr(method, f.name)) for f in fields(method)},
                    "sites": [site.path for site, _ in installed],
                }
            )
        except (TypeError, ValueError) as failure:
            raise AdapterError(f"{type(method).__name__} has a field that JSON cannot hold: {failure}") from failure
        readme = (
            f"# {type(method).__name__} adapter\n\n{adapter.num_parameters:,} trained parameters for a {type(adapter.model).__name__}, "
            f"in Byway's own format ({why}).\n\n```python\nimport byway\nbyway.load(model, 'PATH')\n```\n"
        )
        write(directory, {CONFIG: config, README: readme}, {WEIGHTS: (tensors, make_record(adapter, tensors, tokenizer))})

    def describe(self, directory: Path, options: LoadOptions) -> Method:
        config = self.read_config(directory)
        return _method(directory / CONFIG, config["method"], config["fields"], options)

    def load(self, model: nn.Module, directory: Path, options: LoadOptions) -> Loaded:
        file = directory / CONFIG
        config = self.read_config(directory)
        method, listed_sites = _method(file, config["method"], config["fields"], options), config["sites"]
        method = replace(method, **options.fields)
        tensors, metadata = read_safetensors(directory / WEIGHTS)
        recorded = read_record(metadata, tensors, directory / WEIGHTS)
        with errors_in(file):
            context = BuildContext(options.tokenizer, generator=torch.Generator(), trusted=options.allow_import, filled=True)
            plan, _ = planned(model, method, context)
        here = [site.path for site, _ in plan]
        if sorted(here) != sorted(listed_sites):
            gone, new = sorted(set(listed_sites) - set(here)), sorted(set(here) - set(listed_sites))
            raise AdapterError(
                f"{file}: the adapter's sites are not those of this model; missing here: {listed(gone, 10) or 'none'}; "
                f"only here: {listed(new, 10) or 'none'}"
            )
        copies = [site.path for site, side in plan if isinstance(side, TrainedCopy)]
        notes = check_base(recorded, model, copies, options, directory)
        for key, side in _keys(plan):
            side.resize({own.removeprefix(f"{key}:"): tensor for own, tensor in tensors.items() if own.startswith(f"{key}:")})
        expected = _state(plan)
        check_tensors(expected, tensors, directory / WEIGHTS)
        return Loaded(method, plan, (*notes, *fill(expected, tensors)))


def _state(installed: Sequence[tuple[Site, SidePath]]) -> dict[str, Tensor]:
    return {f"{key}:{own}": tensor for key, side in _keys(installed) for own, tensor in side.state_dict().items()}


def _keys(installed: Sequence[tuple[Site, SidePath]]) -> Iterator[tuple[str, SidePath]]:
    """Yield (``path`` or ``path+1`` …, side path)."""
    seen: Counter[str] = Counter()
    for site, side in installed:
        yield f"{site.path}+{seen[site.path]}" if seen[site.path] else site.path, side
        seen[site.path] += 1


def _name_of(method: type[Method]) -> str:
    package, _, module = method.__module__.rpartition(".")
    return module if package == "byway.methods" else f"{method.__module__}:{method.__qualname__}"


def _method(file: Path, name: str, values: dict[str, Any], options: LoadOptions) -> Method:
    """Return the method of that name with these fields."""
    given = {_name_of(method): method for method in options.methods}
    if name in given:
        kind = given[name]
    elif name in method_names() or (":" in name and options.allow_import):
        kind = load_method(name)
    elif ":" in name:
        raise AdapterError(
            f"{file}: its method is {name!r}, which is not part of Byway, and no code is imported because a file names it",
            f"pass methods=({name.rpartition(':')[2]},), or allow_import=True (--allow-import) if you trust it",
        )
    else:
        there = listed([*method_names(), *given])
        raise AdapterError(f"{file}: unknown method {name!r} (there are: {there})", nearest(name, method_names()))
    known = {f.name for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise AdapterError(f"{file}: {kind.__name__} has no field {unknown[0]!r}", nearest(unknown[0], known))
    try:
        return kind(**values)
    except (BywayError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: {error}") from error
