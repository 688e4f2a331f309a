"""Layer choices: ``3``, ``[0, 1]``, ``[-1]``, ``"16-"``, ``"0-3,8"``, ``"encoder:0-3"``; counted from 0 within each stack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from byway.errors import listed, nearest

__all__ = ["Layers", "choose_layers"]

Layers = int | str | Sequence[int | str]

_RANGE = re.compile(r"(\d+)(?:(-)(\d*))?")


def choose_layers(layers: Layers, lengths: Mapping[str, int], stacks: Iterable[str]) -> tuple[dict[str, set[int]], list[str]]:
    """(stack -> chosen indices, problems).

    Args:
        layers: what the user wrote.
        lengths: stack -> number of layers, for the stacks in which targets lie.
        stacks: all stacks of the model.
    """
    chosen: dict[str, set[int]] = {name: set() for name in lengths}
    problems: list[str] = []
    entries = [layers] if isinstance(layers, int | str) else list(layers)
    if not entries:
        problems.append("layers is empty: leave it out to take all")
    for entry in entries:
        where, ranges, problem = _parse(entry)
        if problem:
            problems.append(problem)
        elif where is not None and where not in lengths:
            problems.append(f"layers {entry!r}: {_not_there(where, list(stacks))}")
        else:
            for name in [where] if where is not None else lengths:
                problems += _add(chosen[name], ranges, entry, name, lengths[name], qualified=where is not None or len(lengths) == 1)
    return chosen, problems


def _not_there(stack: str, known: list[str]) -> str:
    if stack in known:
        return f"no target lies in stack {stack!r}"
    close = nearest(stack, known)
    return f"there is no stack {stack!r}" + (f"; {close}" if close else "") + f" (there are: {listed(known)})"


def _parse(entry: object) -> tuple[str | None, list[tuple[int, int | None]], str]:
    """(stack or None, inclusive ranges whose end may be open, problem)."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return None, [(entry, entry)], ""
    if not isinstance(entry, str):
        return None, [], f"layers {entry!r}: an index or a range such as '16-' or '0-3' is wanted"
    before, colon, after = entry.rpartition(":")
    ranges: list[tuple[int, int | None]] = []
    for text in after.split(","):
        found = _RANGE.fullmatch(text.strip())
        if found is None:
            meant = " ('0-4' is the first five; [-4, -3, -2, -1] the last four)" if text.strip().startswith("-") else ""
            return None, [], f"layers {entry!r}: {text.strip()!r} is no index or range such as '16-' or '0-3'{meant}"
        first, dash, last = found.groups()
        ranges.append((int(first), int(last) if last else None if dash else int(first)))
    return (before if colon else None), ranges, ""


def _add(into: set[int], ranges: Sequence[tuple[int, int | None]], entry: object, stack: str, length: int, *, qualified: bool) -> list[str]:
    """Put the indices of `ranges` into `into`; what is out of range or empty comes back as problems."""
    problems = []
    for first, last in ranges:
        start = first + length if first < 0 else first
        stop = length - 1 if last is None else last + length if last < 0 else last
        if start < 0 or stop >= length or start >= length:
            other = "" if qualified else f"; '{stack}:...' chooses in this stack alone"
            problems.append(f"layers {entry!r} is out of range: {stack} has {length} layers (0-{length - 1}){other}")
        elif start > stop:
            problems.append(f"layers {entry!r} is empty: {first} comes after {last}")
        else:
            into.update(range(start, stop + 1))
    return problems
