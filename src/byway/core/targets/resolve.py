"""Resolve targets to modules, strictly: everything the user wrote must have an effect.

A **string** is ``"all-linear"``, a role (``"attention"``, ``"feed-forward"``), or else a regular expression that must
match whole module paths. In a **list**, each entry is a role or a name: a path, or the end of a path after a dot
(``"q_proj"``, ``"self_attn.q_proj"``). ``layers`` counts within each stack. Every entry must select something; all
problems are reported together, each with the nearest existing name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from byway.core.fields import Layers
from byway.core.slots import Site
from byway.core.targets.patterns import Pattern, compile_pattern
from byway.core.targets.search import ALL_LINEAR, Search, Selection, leaves, with_names
from byway.core.weights import is_linear
from byway.errors import TargetError, nearest

__all__ = ["ALL_LINEAR", "modules_to_save", "pattern_value", "resolve"]

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
    """Return the sites that `targets` selects, in module order.

    Args:
        model: any module; attached adapters are ignored.
        targets: see the module's docstring. None: `default`, or without one the usual targets of the architecture.
        exclude: written like `targets`, and takes precedence over them. In a list, a container's name excludes its
            content.
        layers: indices (negative ones count from the end) or ranges: ``3``, ``[0, 1]``, ``"16-"``, ``"0-3,8"``,
            ``"encoder:0-3"``.
        accepts: modules that the method supports. A target that selects any other module is an error.
        default: meaning of None, for a method with default targets of its own.
        patterns: mappings each of whose keys must match one of the sites, by name: ``{"rank_pattern": {...}}``.
        notes: list to which notes for the user about skipped modules are added (the head, experts stored as 3-D
            parameters).
        usual: paths that None stands for, instead of `default`. They count as one entry: `layers` and `exclude` may
            remove some.

    Raises:
        TargetError: lists every problem.
    """
    search = Search(model, accepts)
    if targets is None and usual is not None:
        found: Selection = {"(by default)": list(usual)}
    else:
        wanted = default if targets is None else targets
        written: str | Sequence[str] = search.facts.require("default_targets") if wanted is None else wanted
        if written == ALL_LINEAR:
            found = search.all_linear()
        else:
            found = {entry: search.usable(entry, hits) for entry, hits in search.select(written, "target").items()}
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
    """Return the modules to train whole. `names`: ``"auto"`` (the task heads), ``"none"``, or paths or ends of paths.

    Raises:
        TargetError: a name matches nothing, or a module has no parameters.
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
    """Return the value of the first key (an expression) that matches `path` or its end after a dot, else `default`."""
    return next((value for key, value in pattern.items() if _ending(key).matches(path)), default)


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
