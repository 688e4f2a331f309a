"""A single resolution of targets: what the entries select, and every problem with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from torch import nn

from byway.core.families import ROLES, Facts, facts, language_stacks, layer_index, locate
from byway.core.fields import Layers
from byway.core.reads import read_directly
from byway.core.slots import base_modules
from byway.core.targets.layers import LANGUAGE_MODEL, choose_layers, in_language_model
from byway.core.targets.patterns import compile_pattern
from byway.core.weights import is_linear, is_map, odd_output
from byway.errors import TargetError, listed, nearest, together

__all__ = ["ALL_LINEAR", "Search", "Selection", "is_experts", "leaves", "with_names"]

ALL_LINEAR = "all-linear"
Selection = Mapping[str, Sequence[str]]
"""Entry as the user wrote it → paths it selects."""


def leaves(paths: Iterable[str]) -> list[str]:
    """Return the distinct last segments of `paths`, without list indices."""
    return list(dict.fromkeys(leaf for path in paths if not (leaf := path.rpartition(".")[2]).isdigit()))


def with_names(problem: str, suggestion: str, names: Iterable[str]) -> str:
    """Append the suggestion and the existing names to `problem`, if there are any."""
    there = listed(names)
    return problem + (f"; {suggestion}" if suggestion else "") + (f" (there are: {there})" if there else "")


class Search:
    """The modules of a model, which of them a method accepts, and the problems and notes collected so far."""

    def __init__(self, model: nn.Module, accepts: Callable[[nn.Module], bool]) -> None:
        self.model = model
        self.accepts = accepts
        self.modules = {path: module for path, module in base_modules(model) if path}
        self.facts: Facts = facts(model)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.hint = ""

    def finish(self) -> None:
        """Raise all problems as one :class:`TargetError`, if there are any."""
        if self.problems:
            raise TargetError(together([(problem, "") for problem in self.problems])[0], self.hint)

    def acceptable(self) -> list[str]:
        """Return the leaf names of the modules that the method accepts."""
        return leaves(path for path, module in self.modules.items() if self.accepts(module))

    def select(self, written: str | Sequence[str], what: str) -> Selection:
        """Return entry → all paths it matches, accepted or not. No match is a problem. `what`: noun for an entry."""
        if isinstance(written, str):
            return {written: self._role(written) if written in ROLES else self._expression(written, what)}
        if not written:
            self.problems.append(f"no {what} is given: the list is empty")
        return {entry: self._role(entry) if entry in ROLES else self.named(entry, what, written) for entry in written}

    def named(self, name: str, what: str, among: Sequence[str] = ()) -> list[str]:
        """Return the paths that equal `name` or end with it after a dot."""
        hits = self._ending(name)
        if not hits:
            names = self.acceptable()
            others = [n for n in [*ROLES, *names, *self.modules] if n not in among]
            self.problems.append(with_names(f"{what} {name!r} matches no module", nearest(name, others), names))
            if name == ALL_LINEAR:
                self.hint = f"write {ALL_LINEAR!r} as a plain string, not in a list"
            elif re.search(r"[\\*+?|^$()\[\]]", name):
                self.hint = "a list contains names; write a regular expression as a plain string"
        return hits

    def _ending(self, name: str) -> list[str]:
        return [path for path in self.modules if path == name or path.endswith(f".{name}")]

    def _role(self, name: str) -> list[str]:
        try:
            return list(self.facts.role(name))
        except TargetError as error:
            experts = [path for path, module in self.modules.items() if is_experts(path, module)]
            if experts and name != "attention":
                self.problems.append(f"role {name!r}: the experts' weights are 3-D parameters, not linear maps ({listed(experts, 2)})")
            else:
                self.problems.append(f"role {name!r}: {error.message}")
                self.hint = error.hint
            return []

    def _expression(self, text: str, what: str) -> list[str]:
        try:
            pattern = compile_pattern(text)
            hits = [path for path in self.modules if pattern.matches(path)]
        except TargetError as error:
            self.problems.append(f"{what}: {error.message}")
            self.hint = error.hint
            return []
        if not hits:
            names = self.acceptable()
            listable = bool(self._ending(text))
            close = "" if listable else nearest(text, [ALL_LINEAR, *ROLES, *names])
            self.problems.append(with_names(f"{what} {text!r} (a regular expression for whole paths) matches no module", close, names))
            self.hint = f"to name modules, write a list: [{text!r}]" if listable else "the whole path must match: start with '.*'"
        return hits

    def usable(self, entry: str, hits: Sequence[str], why: str = "this method does not support it") -> list[str]:
        """Return the `hits` that the method accepts. Any other one (a norm, a container ...) is a problem."""
        dead = [path for path in hits if path in self.read_directly]
        good = [path for path in hits if self.accepts(self.modules[path]) and path not in dead]
        odd = {path: what for path in good if (what := odd_output(self.modules[path]))}
        good = [path for path in good if path not in odd]
        wrong = [path for path in hits if not self.accepts(self.modules[path])]
        if dead and good:
            self.notes.append(f"{entry!r} leaves out {self._bypassed(dead)}")
        elif dead:
            self.problems.append(f"{entry!r}: {self._parent(dead[0])} reads the weight of {dead[0]!r} directly and would bypass an adapter")
        self.problems += [f"{entry!r} matches {p!r} ({self._kind(p)}): its forward {what}" for p, what in odd.items()]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            inside = leaves(p for p, m in self.modules.items() if p.startswith(f"{wrong[0]}.") and self.accepts(m))
            self.problems.append(
                f"{entry!r} matches {wrong[0]!r} ({self._kind(wrong[0])}){more}: {why}"
                + (f"; it contains: {listed(inside)}" if inside else "")
            )
        return good

    def _kind(self, path: str) -> str:
        return type(self.modules[path]).__name__

    def all_linear(self) -> Selection:
        """Select every linear map (and experts, if the method accepts them) except the output head and task heads."""
        apart = [head for head in (self.facts.head, *self.facts.task_heads) if head is not None]
        found, heads, dead, experts = [], [], [], []
        odd: dict[str, list[str]] = {}
        for path, module in self.modules.items():
            if is_linear(module) and any(path == head or path.startswith(f"{head}.") for head in apart):
                heads.append(path)
            elif path in self.read_directly and is_linear(module):
                dead.append(path)
            elif why := odd_output(module):
                odd.setdefault(f"{self._kind(path)}, whose forward {why}", []).append(path)
            elif (is_linear(module) or is_experts(path, module)) and self.accepts(module):
                found.append(path)
            elif is_experts(path, module):
                experts.append(path)
        if heads:
            self.notes.append(f"{ALL_LINEAR} leaves out the output head: {listed(heads)}")
        if experts:
            kinds = listed(type(self.modules[path]).__name__ for path in experts)
            self.notes.append(f"{ALL_LINEAR} leaves out the experts of {len(experts)} layers, whose weights are 3-D parameters ({kinds})")
        self.notes += [f"{ALL_LINEAR} leaves out {what}: {listed(paths, 3)}" for what, paths in odd.items()]
        if dead:
            self.notes.append(f"{ALL_LINEAR} leaves out {self._bypassed(dead)}")
        if not found:
            self.problems.append(f"{ALL_LINEAR}: the model has no linear map that this method supports")
        return {ALL_LINEAR: found}

    @cached_property
    def read_directly(self) -> set[str]:
        """The maps whose weight is used without calling them, so that their hooks never run."""
        return read_directly(self.model, [path for path, module in self.modules.items() if is_map(module)], self.modules)

    def _bypassed(self, dead: Sequence[str]) -> str:
        """Describe the modules `dead` and what reads them."""
        readers = listed(self._parent(path) for path in dead)
        return f"modules whose weight {readers} reads directly, bypassing an adapter: {listed(dead, 3)}"

    def _parent(self, path: str) -> str:
        return type(self.modules.get(path.rpartition(".")[0], self.model)).__name__

    def in_layers(self, found: Selection, layers: Layers) -> Selection:
        """Return the part of `found` that is in the selected layers of its stack."""
        stacks = self.facts.stacks
        if not stacks:
            self.problems.append("layers: no stack of layers was found in this model")
            self.hint = "select layers by full paths or by a regular expression"
            return found
        if any(str(entry).startswith(LANGUAGE_MODEL) for entry in ([layers] if isinstance(layers, int | str) else layers)):
            own = language_stacks(self.model)
            if not own:
                self.problems.append(f"layers {layers!r}: the model has no text decoder")
                return found
            layers = in_language_model(layers, own)
        index = layer_index(stacks)
        places = {path: locate(path, index) for paths in found.values() for path in paths}
        inside = {place[0] for place in places.values() if place is not None}
        lengths = {name: len(paths) for name, paths in stacks.items() if name in inside or not inside}
        chosen, problems = choose_layers(layers, lengths, stacks)
        self.problems += problems
        if problems:
            return found
        kept = {entry: [p for p in paths if (at := places[p]) is not None and at[1] in chosen[at[0]]] for entry, paths in found.items()}
        self.problems += [f"target {entry!r} matches nothing in layers {layers!r}" for entry in found if found[entry] and not kept[entry]]
        return kept

    def without(self, found: Selection, exclude: str | Sequence[str]) -> Selection:
        """Return `found` without what `exclude` selects; a container's name excludes everything inside it."""
        out = {path for paths in self.select(exclude, "exclude").values() for path in paths}
        inside = () if isinstance(exclude, str) else tuple(f"{path}." for path in out)
        kept = {entry: [p for p in paths if p not in out and not p.startswith(inside)] for entry, paths in found.items()}
        self.problems += [f"target {entry!r}: exclude removes all its matches" for entry in found if found[entry] and not kept[entry]]
        return kept


def is_experts(path: str, module: nn.Module) -> bool:
    """True if the module stores the weights of several experts as one 3-D parameter."""
    named = "expert" in path.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()
    return named and any(p is not None and p.ndim == 3 for p in module._parameters.values())
