"""Byway's own format, for methods that HF peft has no name for.

A directory with two files (and a README) under names that peft does not look for:

``byway_adapter.json``::

    {"format": 1,
     "method": "ladder_side_tuning",          # a file of byway/methods, or "package.module:Class" for a method of one's own
     "fields": {"reduction": 8, ...},         # the method's fields; lists for tuples
     "sites":  ["model.layers.0.mlp", ...]}   # where its side paths hang, in module order; "" is the model itself

``byway_adapter.safetensors``: each side path's ``state_dict()`` (parameters and persistent buffers, encoders too), a tensor called
``<site>:<name>``, for instance ``model.layers.0.mlp:down.weight``; ``:prompt`` at the model itself. Its metadata holds the record that
``formats/tensors.py`` describes: the hash of the tensors and the fingerprint of the base.

Loading rebuilds the method from its fields, compares its sites with those listed, requires every tensor with its shape, finite and
floating-point (or of the very dtype it is expected in), and attaches only then. A class named by import path is never imported because a
file says so: it must be passed in ``methods``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.copies import TrainedCopy
from byway.core import Adapter, BuildContext, Method, SidePath, Site, hang, planned
from byway.errors import AdapterError, BywayError, listed, nearest
from byway.formats.files import atomic_directory, read_json, read_safetensors, to_json, write_safetensors
from byway.formats.peft import NATIVE, README, is_adapter_directory
from byway.formats.tensors import check_base, check_tensors, fill, make_record, read_record
from byway.methods import load as load_method
from byway.methods import names as method_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONFIG", "load_adapter", "save_adapter"]

CONFIG, WEIGHTS = NATIVE
FORMAT = 1


def save_adapter(adapter: Adapter, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write the adapter into `directory` itself; an adapter that is there is replaced in one step, anything else refused."""
    hung = adapter.side_paths()
    tensors = _state(hung)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"the adapter holds NaN or infinity, in {', '.join(broken[:10])}", "load an earlier checkpoint")
    method = adapter.method
    try:
        config = to_json(
            {
                "format": FORMAT,
                "method": _name_of(type(method)),
                "fields": {f.name: _plain(getattr(method, f.name)) for f in fields(method)},
                "sites": [site.path for site, _ in hung],
            }
        )
    except (TypeError, ValueError) as failure:
        raise AdapterError(f"{type(method).__name__} has a field that JSON cannot hold: {failure}") from failure
    copies = [site.path for site, side in hung if isinstance(side, TrainedCopy)]
    metadata = make_record(adapter.model, tensors, copies, tokenizer)
    with atomic_directory(directory, replace=is_adapter_directory) as new:
        (new / CONFIG).write_text(config, encoding="utf-8")
        write_safetensors(new / WEIGHTS, tensors, metadata)
        (new / README).write_text(_readme(adapter), encoding="utf-8")
    return directory


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


def _state(hung: Sequence[tuple[Site, SidePath]]) -> dict[str, Tensor]:
    """``path:name`` → tensor; a further side path at one site counts, ``path+1:name``."""
    return {f"{place}:{key}": tensor for place, side in _places(hung) for key, tensor in side.state_dict().items()}


def _places(hung: Sequence[tuple[Site, SidePath]]) -> Iterator[tuple[str, SidePath]]:
    seen: Counter[str] = Counter()
    for site, side in hung:
        yield f"{site.path}+{seen[site.path]}" if seen[site.path] else site.path, side
        seen[site.path] += 1


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


def _name_of(method: type[Method]) -> str:
    package, _, module = method.__module__.rpartition(".")
    return module if package == "byway.methods" else f"{method.__module__}:{method.__qualname__}"


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _hashable(value: Any) -> Any:
    return tuple(_hashable(part) for part in value) if isinstance(value, list) else value


def _readme(adapter: Adapter) -> str:
    return (
        f"# {type(adapter.method).__name__} adapter\n\n{adapter.num_parameters:,} trained parameters for a {type(adapter.model).__name__}, "
        "in Byway's own format (HF peft has no name for this method).\n\n```python\nimport byway\nbyway.load(model, 'PATH')\n```\n"
    )
