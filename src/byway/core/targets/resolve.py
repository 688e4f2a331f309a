"""Which modules a method acts on, from what the user wrote: strict, so that nothing written is silently without effect.

A **string** is ``"all-linear"``, a role (``"attention"``, ``"feed-forward"``), or else a regular expression that must match whole module
paths. In a **list** each entry is a role or a name: a path, or its end from a dot on (``"q_proj"``, ``"self_attn.q_proj"``). ``layers``
counts within each stack. Every entry must select something; all problems are reported at once, each with the nearest name there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from byway.core.slots import Site
from byway.core.targets.layers import Layers
from byway.core.targets.patterns import Pattern, compile_pattern
from byway.core.targets.search import ALL_LINEAR, Search, Selection, leaves, raise_problems, with_names
from byway.core.weights import is_linear
from byway.errors import TargetError, nearest

__all__ = ["ALL_LINEAR", "Layers", "check_patterns", "modules_to_save", "pattern_value", "resolve"]

T = TypeVar("T")


def resolve(
    model: nn.Module,
    targets: str | Sequence[str] | None,
    *,
    exclude: str | Sequence[str] | None = None,
    layers: Layers | None = None,
    accepts: Callable[[nn.Module], bool] = is_linear,
    default: str | Sequence[str] | None = None,
    patterns: Mapping[str, Mapping[str, object]] | None = None,
    notes: list[str] | None = None,
    usual: Sequence[str] | None = None,
) -> list[Site]:
    """The sites that `targets` selects, in module order.

    Args:
        model: any module; what hangs on it is not looked at.
        targets: as above; None stands for `default`, and without one for what is usual for the architecture.
        exclude: written like `targets`; wins over them. In a list, the name of a container excludes what is inside.
        layers: indices (negative ones count from the end) or ranges: ``3``, ``[0, 1]``, ``"16-"``, ``"0-3,8"``, ``"encoder:0-3"``.
        accepts: what the method can act on. A target that is anything else is an error, not ignored.
        default: what None stands for, where the method has targets of its own.
        patterns: ``{"rank_pattern": {...}}``: mappings each of whose keys must match one of the sites.
        usual: instead of `default`: the paths that None stands for, as one entry, so that `layers` and `exclude` need not reach each.
        notes: receives what the user should know about what was left out (the head, experts kept as 3-D parameters).

    Raises:
        TargetError: with every problem found.
    """
    search = Search(model, accepts)
    if targets is None and usual is not None:
        return _chosen(search, {"(by default)": list(usual)}, exclude, layers, patterns, notes)
    wanted = default if targets is None else targets
    written: str | Sequence[str] = search.facts.require("default_targets") if wanted is None else wanted
    if written == ALL_LINEAR:
        found = search.all_linear()
    else:
        found = {entry: search.usable(entry, hits) for entry, hits in search.select(written, "target").items()}
    return _chosen(search, found, exclude, layers, patterns, notes)


def _chosen(
    search: Search,
    found: Selection,
    exclude: str | Sequence[str] | None,
    layers: Layers | None,
    patterns: Mapping[str, Mapping[str, object]] | None,
    notes: list[str] | None,
) -> list[Site]:
    """What is left of `found` after `layers` and `exclude`, in module order; all problems are raised."""
    if layers is not None:
        found = search.in_layers(found, layers)
    if exclude is not None:
        found = search.without(found, exclude)
    paths = {path for entry in found.values() for path in entry}
    if paths:
        for what, pattern in (patterns or {}).items():
            search.problems += _unmatched(paths, pattern, what)
    search.finish()
    if notes is not None:
        notes.extend(search.notes)
    return [Site(path, module) for path, module in search.modules.items() if path in paths]


def modules_to_save(model: nn.Module, names: str | Sequence[str]) -> list[Site]:
    """The modules to be trained whole: ``"auto"`` the model's task heads, ``"none"`` nothing, or names (exact or dotted suffix).

    Raises:
        TargetError: a name that matches nothing, or a module without parameters.
    """
    if names == "none":
        return []
    search = Search(model, lambda module: next(module.parameters(), None) is not None)
    if names == "auto":
        paths = list(search.facts.task_heads)
    else:
        entries = (names,) if isinstance(names, str) else tuple(names)
        found = {name: search.named(name, "module to save", entries) for name in entries}
        paths = [path for name, hits in found.items() for path in search.usable(name, hits, "it has no parameters to train")]
        search.finish()
    outer = tuple(f"{path}." for path in paths)
    return [Site(path, module) for path, module in search.modules.items() if path in paths and not path.startswith(outer)]


def pattern_value(path: str, pattern: Mapping[str, T], default: T) -> T:
    """The value of the first key that, as a regular expression, matches `path` or its end from a dot on; `default` if none does."""
    return next((value for key, value in pattern.items() if _ending(key).matches(path)), default)


def check_patterns(paths: Iterable[str], pattern: Mapping[str, object], what: str) -> None:
    """Raise a :class:`TargetError` naming every key of `pattern` (which is called `what`) that matches none of `paths`."""
    raise_problems(_unmatched(list(paths), pattern, what))


def _ending(key: str) -> Pattern:
    return compile_pattern(key, wrap=r"(?:.*\.)?(?:{})")


def _unmatched(paths: Iterable[str], pattern: Mapping[str, object], what: str) -> list[str]:
    problems = []
    for key in pattern:
        try:
            ending = _ending(key)
            if not any(ending.matches(path) for path in paths):
                names = leaves(paths)
                problems.append(with_names(f"{what} key {key!r} matches no target", nearest(key, [*names, *paths]), names))
        except TargetError as error:
            problems.append(f"{what}: {error.message}")
    return problems
