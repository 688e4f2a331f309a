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

from torch import Tensor

from byway.core.copies import TrainedCopy
from byway.core.method import Attached, Method
from byway.core.slots import SidePath, Site
from byway.disk.files import atomic_directory, to_json, write_safetensors
from byway.errors import AdapterError
from byway.formats.directory import NATIVE, README, is_adapter_directory
from byway.formats.record import make_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONFIG", "save_adapter"]

CONFIG, WEIGHTS = NATIVE
FORMAT = 1


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
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


def _state(hung: Sequence[tuple[Site, SidePath]]) -> dict[str, Tensor]:
    """``path:name`` → tensor; a further side path at one site counts, ``path+1:name``."""
    return {f"{place}:{key}": tensor for place, side in _places(hung) for key, tensor in side.state_dict().items()}


def _places(hung: Sequence[tuple[Site, SidePath]]) -> Iterator[tuple[str, SidePath]]:
    seen: Counter[str] = Counter()
    for site, side in hung:
        yield f"{site.path}+{seen[site.path]}" if seen[site.path] else site.path, side
        seen[site.path] += 1


def _name_of(method: type[Method]) -> str:
    package, _, module = method.__module__.rpartition(".")
    return module if package == "byway.methods" else f"{method.__module__}:{method.__qualname__}"


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _readme(adapter: Attached) -> str:
    return (
        f"# {type(adapter.method).__name__} adapter\n\n{adapter.num_parameters:,} trained parameters for a {type(adapter.model).__name__}, "
        "in Byway's own format (HF peft has no name for this method).\n\n```python\nimport byway\nbyway.load(model, 'PATH')\n```\n"
    )
