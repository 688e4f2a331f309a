r"""Full fine-tuning: y = f(x; θ'), where θ' starts as the base's θ and is trained in full.

::

    x ──┬── module (θ, frozen)                 not run while the adapter is active
        └── its copy (θ') ──── y

The baseline for every other method: train the whole model, some layers (``layers: "-2-"``), or some modules. The base's
tensors are not written. Every chosen module has a copy that runs in its place, so disabling, switching and detaching
stay exact; the cost is a second copy of the trained tensors. Merging writes the copies into the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from byway.core.copies import Copy
from byway.core.families.facts import inside
from byway.core.fields import Layers, Names
from byway.core.method import Attached, BuildContext, Method, Placement
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import resolve
from byway.core.token_rows import vocabulary
from byway.core.weights import is_quantized
from byway.errors import TargetError, listed

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every tensor of the chosen modules, trained in full as copies.

    Attaching leaves the output unchanged. Tensors that are tied in the base (an output head and the embedding) stay one
    tensor if both ends are trained; if only one is, it is untied, and a note says so. Norms and biases have no weight
    decay. Copies are float32 (float64 on a float64 base). Two such adapters of one module cannot be active at once.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model, has no parameters, or is not called by its parent, which reads
            its tensors.
    """

    targets: Names | None = None
    """Modules to train, with everything in them: a regular expression, or a list of names; null: the whole model."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to train, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    mergeable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = False

    def plan(self, model: nn.Module) -> Placement:
        units = _units(model)
        chosen = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=_has_parameters, usual=list(units))
        modules = dict(base_modules(model))
        within: dict[str, nn.Module] = {}
        for site in chosen:
            parts = {path: unit for path, unit in units.items() if inside(path, site.path)}
            # a target inside a unit is copied by itself, if its parent calls it
            within |= parts or {site.path: site.module}
        # `exclude` may name a part of a target, whose other parts are trained
        out = [] if self.exclude is None else [site.path for site in resolve(model, self.exclude, accepts=lambda module: True)]
        kept = [path for path in modules if path in within and not any(inside(path, other) for other in out)]
        sites = [Site(path, modules[path]) for path in kept]
        return Placement(sites, self._notes(model, sites))

    def _notes(self, model: nn.Module, sites: Sequence[Site]) -> list[str]:
        notes = []
        trained = {id(p) for site in sites for p in site.module.parameters()}
        for path, module in base_modules(model):
            if any(inside(path, site.path) for site in sites):
                continue
            tied = [name for name, p in module._parameters.items() if p is not None and id(p) in trained]
            if tied:
                notes.append(f"{path}.{tied[0]} is tied to a trained tensor: the trained copy is untied, and this one stays frozen")
        own = [name for name, p in model._parameters.items() if p is not None]
        if own and self.targets is None:
            notes.append(f"left out, because they belong to the model itself and not to a module in it: {listed(own, 5)}")
        return notes

    def with_token_rows(self, model: nn.Module, tokens: Sequence[int]) -> Method | None:
        chosen = [site.path for site in self.plan(model).sites]
        return self if all(any(inside(path, site) for site in chosen) for path in vocabulary(model)) else None

    def check(self, sites: Sequence[Site]) -> None:
        packed = [f"{site.path}.{path}".strip(".") for site in sites for path, part in base_modules(site.module) if is_quantized(part)]
        if packed:
            raise TargetError(f"{packed[0]} is stored in 8 or 4 bits and cannot be trained in full", "use lora, or exclude it")

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return Copy(site.module, context.shared)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups: matrices with weight decay, vectors (norms, biases) without."""
        parameters = [p for _, p in adapter.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "lr": learning_rate},
            {"params": [p for p in parameters if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules that own parameters directly; together they contain every parameter below the root.

    A module that owns a parameter reads it itself (a class token, attention that reads the weights of its parts), so it
    is copied with everything inside.
    """
    found: dict[str, nn.Module] = {}
    last = ""
    for path, module in base_modules(model):  # everything inside a module comes right after it
        if path and not (last and inside(path, last)) and any(p is not None for p in module._parameters.values()):
            found[path], last = module, path
    if not found:
        raise TargetError(f"{type(model).__name__} has no module with parameters", "wrap it in a module, so that it can be copied")
    return found
