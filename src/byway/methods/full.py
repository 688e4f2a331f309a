r"""Full fine-tuning: y = f(x; θ'), where θ' starts as the base's θ and every number of it is trained.

::

    x ──┬── module (θ, frozen, as it was)      not run while the adapter is active
        └── its copy (θ') ──── y

The yardstick of every method here: the whole model, chosen layers (``layers: "-2-"``), or chosen modules. The base's tensors are not
written: every chosen module has a copy that answers in its place, so disabling, switching and detaching stay exact, at the price of a
second copy of what is trained. A merge writes the copies into the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from byway.core.copies import Copy
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules, parent_path
from byway.core.weights import is_quantized
from byway.errors import ConfigError, TargetError, listed

if TYPE_CHECKING:
    from byway.core.method import Attached

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every tensor of the chosen modules, trained whole as copies beside the base.

    Attaching leaves the output as it is. Tensors that are tied in the base (an output head and the embedding) and both trained stay one
    tensor; where only one end is trained, it is untied, and a note says so. Norms and biases have no weight decay. Copies are float32
    (float64 on a float64 base). Two such adapters of one module cannot be active at once.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model, has no parameters, or is read by its parent without being called.
    """

    targets: str | Sequence[str] | None = None
    """Modules to train, with everything inside them: names or a regular expression; none: the whole model."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to train, counted per stack: indices, or ranges such as ``16-``."""

    mergeable: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and not self.targets:
            raise ConfigError("targets is empty: nothing would be trained", "leave it out for the whole model")

    def sites(self, model: nn.Module) -> Iterator[Site]:
        from byway.core.targets.resolve import resolve

        units = _units(model)
        chosen = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=_has_parameters, usual=list(units))
        modules = dict(base_modules(model))
        within: dict[str, nn.Module] = {}
        for site in chosen:
            inside = {path: unit for path, unit in units.items() if path == site.path or path.startswith(f"{site.path}.")}
            # a name for a part of what can only be copied as a whole stands for that part, if its parent calls it
            within |= inside or {site.path: site.module}
        out = self._left_out(model)
        for path, module in modules.items():
            if path in within and not any(path == o or path.startswith(f"{o}.") for o in out):
                yield Site(path, module)

    def _left_out(self, model: nn.Module) -> list[str]:
        """What `exclude` names: it may lie inside a target, whose other parts are trained."""
        from byway.core.targets.resolve import resolve

        if self.exclude is None:
            return []
        return [site.path for site in resolve(model, self.exclude, accepts=lambda module: True)]

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        notes = []
        sites = list(self.sites(model))
        trained = {id(p) for site in sites for p in site.module.parameters()}
        covered = tuple(site.path for site in sites)
        for path, module in base_modules(model):
            if any(path == c or path.startswith(f"{c}.") for c in covered):
                continue
            tied = [name for name, p in module._parameters.items() if p is not None and id(p) in trained]
            if tied:
                notes.append(f"{path}.{tied[0]} is tied to a trained tensor: the copy is untied, this end stays as it was")
        own = [name for name, p in model._parameters.items() if p is not None]
        if own and self.targets is None:
            notes.append(f"left out, since they belong to the model itself and not to a module in it: {listed(own, 5)}")
        return tuple(notes)

    def check(self, sites: Sequence[Site]) -> None:
        packed = [f"{site.path}.{path}".strip(".") for site in sites for path, part in _parts(site.module) if is_quantized(part)]
        if packed:
            raise TargetError(f"{packed[0]} is kept in 8 or 4 bits: numbers of so few bits cannot be trained", "use lora, or exclude it")

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        side = Copy(site.module)
        twins = dict(base_modules(side.copy))
        for path, part in _parts(site.module):
            for name, parameter in part._parameters.items():
                mine = twins[path]._parameters.get(name)
                if parameter is not None and mine is not None:
                    # tied tensors have one copy, whichever module is built first; the key holds the tensor, so that its id stays its own
                    twins[path]._parameters[name] = context.shared.setdefault(("full", id(parameter)), (parameter, mine))[1]
        return side

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Matrices with weight decay; vectors (norms, biases) without, as is usual."""
        parameters = [p for _, p in adapter.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "lr": learning_rate},
            {"params": [p for p in parameters if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return base_modules(module)


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to copy so that every parameter below the root is in one: the outermost ones that own parameters directly.

    What owns a parameter reads it itself (a class token, attention that reads the weights of its parts), so it is copied with all inside.
    """
    found: dict[str, nn.Module] = {}
    for path, module in base_modules(model):
        if not path or any(path.startswith(f"{outer}.") for outer in _outer(path, found)):
            continue
        if any(parameter is not None for parameter in module._parameters.values()):
            found[path] = module
    if not found:
        raise TargetError(f"{type(model).__name__} has no module with parameters", "wrap it in a module, so that it can be copied")
    return found


def _outer(path: str, found: dict[str, nn.Module]) -> Iterator[str]:
    """The paths above `path` that are in `found`."""
    while path:
        path = parent_path(path)
        if path in found:
            yield path
