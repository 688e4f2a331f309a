"""What all adapter files share: the checks of their tensors, and the record of the base in the file's metadata.

The record is in the metadata of the safetensors file itself, under ``byway``: ``{"format": 1, "sha256": ...,
"tensors": names, "base": fingerprint, "classes": of a task head, "path": where the base was, if it was on this
disk}``. Other programs ignore it. A program that rewrites the file drops it, so it can never describe other tensors
than those in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.base.fingerprint import Fingerprint, compare, fingerprint
from byway.base.source import on_this_disk
from byway.core.copies import TrainedCopy
from byway.core.disk.files import read_safetensors, read_safetensors_header
from byway.core.method import Attached
from byway.core.slots import SidePath
from byway.errors import AdapterError, BywayError, counted, listed
from byway.formats.classes import Classes
from byway.formats.format import LoadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "base_name", "check_base", "check_tensors", "destinations", "digest", "errors_in", "fill", "make_record", "most", "read_record",
    "read_weights", "recorded_path",
]  # fmt: skip

FORMAT = 1
FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@contextmanager
def errors_in(file: Path) -> Iterator[None]:
    """Within this context a BywayError, or torch's refusal of a size, becomes an AdapterError that names `file`."""
    try:
        yield
    except BywayError as error:
        raise AdapterError(f"{file}: {error.message}", error.hint) from error
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise AdapterError(f"{file}: what it describes cannot be built: {reason}", "is one of its sizes wrong?") from error


def read_weights(file: Path, instead_of_pickle: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file; `instead_of_pickle`: the hint if there are only pickles."""
    if file.exists():
        return read_safetensors(file)
    there = [entry.name for entry in file.parent.iterdir()]
    pickles = sorted(name for name in there if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        what = f"{file.parent} has its weights only as a pickle ({listed(pickles)}), which can run code and is never opened here"
        raise AdapterError(what, instead_of_pickle)
    raise AdapterError(f"{file} is missing", f"there are: {listed(there)}")


def destinations(side: SidePath) -> dict[str, Tensor]:
    """Return the tensors of `side` by their names in peft's files; writing into one writes into the side path."""
    own = {tensor.untyped_storage().data_ptr() for tensor in side.state_dict().values()}
    found = side.destinations()
    derived = [name for name, tensor in found.items() if tensor.untyped_storage().data_ptr() not in own]
    if derived:
        raise AdapterError(f"{type(side).__name__} computes {', '.join(derived)} when it is saved: it cannot be filled from a file")
    return found


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path, extra: Collection[str] = ()) -> None:
    """Check the tensors of a file against those they are copied into.

    Every expected tensor must be there and nothing else except `extra`. Shapes must agree. Values must be finite and
    floating-point, or of exactly the expected dtype (a buffer of indices).

    Raises:
        AdapterError: with everything found wrong.
    """
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected and name not in extra]
    if expected and len(missing) == len(expected):
        raise AdapterError(
            f"{where}: 0 of {len(expected)} tensors found (the first would be {missing[0]})"
            + (f"; there are {len(surplus)} others: {most(surplus)}" if surplus else "; the file holds none"),
            "was it saved from this architecture, and is it complete?",
        )
    common = [(name, found[name], expected[name]) for name in expected if name in found]
    shapes = [f"{name} has shape {list(t.shape)}, here it is {list(e.shape)}" for name, t, e in common if t.shape != e.shape]
    kinds = [f"{name} is {str(t.dtype).removeprefix('torch.')}" for name, t, e in common if t.dtype not in FLOATING and t.dtype != e.dtype]
    broken = [name for name, t, _ in common if t.dtype in FLOATING and not torch.isfinite(t).all()]
    problems = [
        f"{len(missing)} of {len(expected)} tensors are missing: {most(missing)}" if missing else "",
        f"{len(surplus)} tensors do not belong to the adapter or to this model: {most(surplus)}" if surplus else "",
        "wrong shapes: " + most(shapes, "; ") if shapes else "",
        "not floating-point: " + most(kinds) if kinds else "",
        f"NaN or infinity in {most(broken)}" if broken else "",
    ]
    if any(problems):
        raise AdapterError(f"{where}: " + "; ".join(filter(None, problems)), "nothing was attached; the model is unchanged")


def fill(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Copy the checked tensors to their destinations; return a note for each pair of dtypes that differ."""
    converted: dict[tuple[torch.dtype, torch.dtype], int] = {}
    with torch.no_grad():
        for name, destination in expected.items():
            destination.copy_(found[name])
            if found[name].dtype != destination.dtype:
                pair = (found[name].dtype, destination.dtype)
                converted[pair] = converted.get(pair, 0) + 1
    return [f"{counted(n, 'tensor')} stored as {old}, kept as {new}".replace("torch.", "") for (old, new), n in converted.items()]


def most(names: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """Join up to `limit` of `names`, in their order, and say how many more there are."""
    return separator.join(names[:limit]) + (f"{separator}… {len(names) - limit} more" if len(names) > limit else "")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def base_name(model: nn.Module) -> str | None:
    """Return where the base was loaded from, as transformers recorded it."""
    config: Any = vars(model).get("config")
    recorded = None if config is None else vars(config).get("_name_or_path")
    return recorded if isinstance(recorded, str) and recorded else None


def recorded_path(directory: Path) -> str | None:
    """Return the absolute path of the base that the adapter in `directory` records, if it was a path."""
    for file in sorted(directory.glob("*.safetensors")):
        text = read_safetensors_header(file)[1].get("byway", "")
        with suppress(ValueError, RecursionError):  # read_record reports a malformed record when the adapter is loaded
            record = json.loads(text)
            path = record.get("path") if isinstance(record, dict) else None
            return path if isinstance(path, str) and os.path.isabs(path) else None
    return None


def make_record(adapter: Attached, tensors: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """Return the metadata: the tensors' hash and the base's fingerprint, without the modules trained whole."""
    copies = [site.path for site, side in adapter.side_paths() if isinstance(side, TrainedCopy)]
    base = fingerprint(adapter.model, tokenizer, without=copies).to_dict()
    record = {"format": FORMAT, "sha256": digest(tensors), "tensors": sorted(tensors), "base": base}
    classes, name = Classes.of(adapter), base_name(adapter.model)
    record |= {} if classes is None else {"classes": classes.to_dict()}
    record |= {"path": os.path.abspath(os.path.expanduser(name))} if name and on_this_disk(name) else {}
    return {"format": "pt", "byway": json.dumps(record, allow_nan=False)}


def read_record(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: Path) -> Fingerprint | None:
    """Return the recorded base after checking the hash of the tensors; None if another program wrote the file."""
    text = metadata.get("byway")
    if text is None:
        return None
    try:
        record: Any = json.loads(text)
        version, expected, base = record["format"], record["sha256"], record["base"]
        names = [str(name) for name in record.get("tensors", tensors)]  # a file of an earlier version records none
    except (ValueError, KeyError, TypeError, RecursionError) as failure:
        raise AdapterError(f"{where}: its metadata is malformed: {failure!r}") from failure
    if version != FORMAT:
        raise AdapterError(f"{where}: written in format {version}, this version of Byway reads {FORMAT}", "update Byway")
    if digest(tensors) != expected:
        surplus, missing = [name for name in tensors if name not in names], [name for name in names if name not in tensors]
        told = [f"not among them: {most(surplus)}"] if surplus else []
        told += [f"missing: {most(missing)}"] if missing else []
        why = "; ".join(told) or "their hash differs"
        raise AdapterError(f"{where}: its tensors are not those that were saved ({why})", "copy or download it again")
    return None if base is None else Fingerprint.from_dict(base, f"{where}: the record of its base")


def check_base(saved: Fingerprint | None, model: nn.Module, without: Collection[str], options: LoadOptions, where: Path) -> tuple[str, ...]:
    """Return notes on how this base differs from the recorded one; AdapterError if it is another base."""
    if saved is None or not options.check_base:
        return ()
    verdict = compare(saved, fingerprint(model, options.tokenizer, without=without))
    if not verdict.same:
        raise AdapterError(
            f"{where} was made for another base: {'; '.join(verdict.differences)}",
            "load that base, or pass check_base=False to try it on this one",
        )
    return verdict.notes
