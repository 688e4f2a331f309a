"""Select layers: ``3``, ``[0, 1]``, ``[-1]``, ``"16-"``, ``"0-3,8"``, ``"encoder:0-3"``; counted from 0 per stack.

``"language-model"`` (also ``"language-model:16-"``) stands for the stack of the text decoder of a composite model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from byway.core.fields import Layers
from byway.errors import listed, nearest

__all__ = ["LANGUAGE_MODEL", "choose_layers", "in_language_model"]

LANGUAGE_MODEL = "language-model"

_RANGE = re.compile(r"(\d+)(?:(-)(\d*))?")


def choose_layers(layers: Layers, lengths: Mapping[str, int], stacks: Iterable[str]) -> tuple[dict[str, set[int]], list[str]]:
    """Return (stack → selected indices, problems).

    Args:
        layers: the selection as the user wrote it.
        lengths: stack → number of layers, for the stacks that contain targets.
        stacks: all stacks of the model.
    """
    chosen: dict[str, set[int]] = {name: set() for name in lengths}
    problems: list[str] = []
    entries = [layers] if isinstance(layers, int | str) else list(layers)
    if not entries:
        problems.append("layers is empty; omit it to use all layers")
    for entry in entries:
        where, ranges, problem = _parse(entry)
        if problem:
            problems.append(problem)
        elif where is not None and where not in lengths:
            if where in (known := list(stacks)):
                problems.append(f"layers {entry!r}: stack {where!r} contains no target")
            else:
                close = nearest(where, known)
                problems.append(f"layers {entry!r}: there is no stack {where!r}{close and f'; {close}'} (there are: {listed(known)})")
        else:
            for name in [where] if where is not None else lengths:
                problems += _add(chosen[name], ranges, entry, name, lengths[name], qualified=where is not None or len(lengths) == 1)
    return chosen, problems


def in_language_model(layers: Layers, stacks: Sequence[str]) -> Layers:
    """Replace ``language-model`` in `layers` by the names of the text decoder's `stacks`."""
    entries = [layers] if isinstance(layers, int | str) else list(layers)
    found: list[int | str] = []
    for entry in entries:
        name, colon, ranges = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        found += [f"{stack}:{ranges if colon else '0-'}" for stack in stacks] if name == LANGUAGE_MODEL else [entry]
    return found


def _parse(entry: object) -> tuple[str | None, list[tuple[int, int | None]], str]:
    """Return (stack or None, inclusive ranges whose end may be open, problem)."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return None, [(entry, entry)], ""
    if not isinstance(entry, str):
        return None, [], f"layers {entry!r}: must be an index or a range such as '16-' or '0-3'"
    before, colon, after = entry.rpartition(":")
    ranges: list[tuple[int, int | None]] = []
    for text in after.split(","):
        found = _RANGE.fullmatch(text.strip())
        if found is None:
            meant = " ('0-4' selects the first five, [-4, -3, -2, -1] the last four)" if text.strip().startswith("-") else ""
            return None, [], f"layers {entry!r}: {text.strip()!r} is not an index or a range such as '16-' or '0-3'{meant}"
        first, dash, last = found.groups()
        ranges.append((int(first), int(last) if last else None if dash else int(first)))
    return (before if colon else None), ranges, ""


def _add(into: set[int], ranges: Sequence[tuple[int, int | None]], entry: object, stack: str, length: int, *, qualified: bool) -> list[str]:
    """Add the indices of `ranges` to `into` and return problems: ranges that are out of bounds or empty."""
    problems = []
    for first, last in ranges:
        start = first + length if first < 0 else first
        stop = length - 1 if last is None else last + length if last < 0 else last
        if start < 0 or stop >= length or start >= length:
            other = "" if qualified else f"; '{stack}:...' selects in this stack only"
            problems.append(f"layers {entry!r} is out of range: {stack} has {length} layers (0-{length - 1}){other}")
        elif start > stop:
            problems.append(f"layers {entry!r} is empty: {first} comes after {last}")
        else:
            into.update(range(start, stop + 1))
    return problems
