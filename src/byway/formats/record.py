"""What all adapter files have in common: which tensors fill which, the checks, and the record of the base in the file's metadata.

The record lies in the metadata of the safetensors file itself, under ``byway``: ``{"format": 1, "sha256": ..., "tensors": names, "base":
fingerprint}``. Other programs ignore it, and one that writes the file anew drops it, so that it can never describe other tensors than those
beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.base.fingerprint import Fingerprint, compare, fingerprint
from byway.core.slots import SidePath
from byway.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_base", "check_tensors", "destinations", "digest", "fill", "make_record", "most", "read_record"]

FORMAT = 1
FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def destinations(side: SidePath) -> dict[str, Tensor]:
    """The tensors of `side` by their names in peft's files; writing into one writes into the side path."""
    own = {tensor.untyped_storage().data_ptr() for tensor in side.state_dict().values()}
    found = side.places()
    derived = [name for name, tensor in found.items() if tensor.untyped_storage().data_ptr() not in own]
    if derived:
        raise AdapterError(f"{type(side).__name__} computes {', '.join(derived)} when it is saved: it cannot be filled from a file")
    return found


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path, extra: Collection[str] = ()) -> None:
    """Every expected tensor is there, nothing else is (but `extra`), shapes agree, values are finite floats; otherwise AdapterError.

    A tensor of another kind is let in where exactly its dtype is expected (a buffer of indices).
    """
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected and name not in extra]
    if expected and len(missing) == len(expected):
        raise AdapterError(
            f"{where}: 0 of {len(expected)} tensors found (the first would be {missing[0]})"
            + (f"; there are {len(surplus)} others: {most(surplus)}" if surplus else "; the file holds none"),
            "was it saved from this architecture, and in one piece?",
        )
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing: {most(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} tensors do not belong to the adapter or to this model: {most(surplus)}")
    common = [(name, found[name], expected[name]) for name in expected if name in found]
    shapes = [f"{name} has shape {list(t.shape)}, here it is {list(e.shape)}" for name, t, e in common if t.shape != e.shape]
    if shapes:
        problems.append("wrong shapes: " + most(shapes, "; "))
    kinds = [f"{name} is {str(t.dtype).removeprefix('torch.')}" for name, t, e in common if t.dtype not in FLOATING and t.dtype != e.dtype]
    if kinds:
        problems.append("not floating-point: " + most(kinds))
    broken = [name for name, t, _ in common if t.dtype in FLOATING and not torch.isfinite(t).all()]
    if broken:
        problems.append(f"NaN or infinity in {most(broken)}")
    if problems:
        raise AdapterError(f"{where}: " + "; ".join(problems), "nothing was attached; the model is as it was")


def fill(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Copy the checked tensors into their places; returns a note for each pair of dtypes that differ."""
    converted: dict[tuple[torch.dtype, torch.dtype], int] = {}
    with torch.no_grad():
        for name, place in expected.items():
            place.copy_(found[name])
            if found[name].dtype != place.dtype:
                pair = (found[name].dtype, place.dtype)
                converted[pair] = converted.get(pair, 0) + 1
    return [f"{n} tensors stored as {old} are kept as {new}".replace("torch.", "") for (old, new), n in converted.items()]


def most(names: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """Up to `limit` of `names`, in their order, and how many more there are."""
    return separator.join(names[:limit]) + (f"{separator}… {len(names) - limit} more" if len(names) > limit else "")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def make_record(
    model: nn.Module, tensors: Mapping[str, Tensor], without: Collection[str], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, str]:
    """The metadata to write beside `tensors`: their hash and the fingerprint of the base in `model`."""
    base = fingerprint(model, tokenizer, without=without).to_dict()
    record = {"format": FORMAT, "sha256": digest(tensors), "tensors": sorted(tensors), "base": base}
    return {"format": "pt", "byway": json.dumps(record, allow_nan=False)}


def read_record(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: Path) -> Fingerprint | None:
    """The base that `metadata` records, after the tensors' hash has been compared; None where another program wrote the file."""
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


def check_base(
    saved: Fingerprint | None, model: nn.Module, without: Collection[str], tokenizer: PreTrainedTokenizerBase | None, where: Path
) -> tuple[str, ...]:
    """Notes on how this base differs from the recorded one; AdapterError if it is another base."""
    if saved is None:
        return ()
    verdict = compare(saved, fingerprint(model, tokenizer, without=without))
    if not verdict.same:
        raise AdapterError(
            f"{where} was made for another base: {'; '.join(verdict.differences)}",
            "load that base, or pass check_base=False to try it on this one",
        )
    return verdict.notes
