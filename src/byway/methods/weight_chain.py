r"""A chain of weight transforms: y = W'x + b, W' = f_k(… f_2(f_1(W))).

::

    W (frozen) ── f_1 ── f_2 ── … ── f_k ── W'        each f: matrix ↦ matrix of the same shape, trained
    x ──────────────────────────────────── W'x + b    kept as Wx + b + (W' − W)x

``low_rank`` then ``magnitude`` is DoRA; the other way round is another function. Additive transforms commute with each other, normalizing
ones with nothing. Source: torch's parametrizations, and minLoRA for low-rank ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from byway.core.fields import finite, whole
from byway.core.method import BuildContext, Frozen
from byway.core.slots import SidePath, Site
from byway.errors import ConfigError, TargetError, listed, nearest
from byway.methods.lowrank.chain import LINKS, Chain, link_class
from byway.methods.lowrank.initialization import matrix_sizes
from byway.methods.lowrank.method import adaptable
from byway.methods.lowrank.targeted import TargetedMethod

__all__ = ["WeightChain"]

_OPTIONS: Mapping[str, frozenset[str]] = {"low_rank": frozenset({"rank", "alpha"}), "magnitude": frozenset()}
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class WeightChain(TargetedMethod):
    """An ordered chain of trained weight transforms beside linear maps, embeddings and convolutions.

    Attaching leaves the output as it is where the links start as the identity, which those that come with Byway do.

    Raises:
        ConfigError: an unknown link, an option out of range, a class that cannot be imported.
        TargetError: something named is not in the model, or a link that changes the shape of its matrix.
    """

    links: Sequence[str | Mapping[str, Any]] = ("low_rank", "magnitude")
    """What the weight goes through, in order: ``low_rank`` (options rank, alpha), ``magnitude``, or the import path of an ``nn.Module`` of
    one's own, ``mypackage.links:Mine``, constructed with the matrix. With options it is a mapping: ``{name: low_rank, rank: 4}``."""
    targets: str | Sequence[str] | None = None
    """``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list of names; none: by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.links, str | Mapping):
            raise ConfigError(f"links is {self.links!r}; it must be a list", "write the one link as a list of one")
        object.__setattr__(self, "links", tuple(_value(link) for link in self.links))
        problems = [problem for number, link in enumerate(self.links) for problem in _problems(number, link)]
        if not self.links:
            problems.append("links is empty; a chain has at least one")
        if problems:
            raise ConfigError("; ".join(problems))

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        from byway.core.targets.resolve import resolve
        from byway.core.targets.search import ALL_LINEAR

        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=adaptable, notes=notes)
        return found, self.targets == ALL_LINEAR

    def too_narrow(self, site: Site) -> bool:
        return self._rank() > min(_sizes(site.module))

    def _rank(self) -> int:
        """The largest rank of a link, 0 without one."""
        return max((options.get("rank", _RANK) for name, options in map(_parts, self.links) if name == "low_rank"), default=0)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            smaller = min(_sizes(site.module))
            if self._rank() > smaller:
                raise TargetError(f"rank {self._rank()} is more than {site.path} can use", f"choose a rank of at most {smaller}")

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return Chain(site.module, [_maker(link, context) for link in self.links], site.path)


def _value(link: Any) -> Any:
    """A link as something that can be hashed."""
    if not isinstance(link, Mapping):
        return link
    return Frozen({key: tuple(value) if isinstance(value, list) else value for key, value in link.items()})


def _parts(link: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options)."""
    if isinstance(link, str):
        return link, {}
    return link.get("name", ""), {key: value for key, value in link.items() if key != "name"}


def _problems(number: int, link: Any) -> list[str]:
    where = f"links[{number}]"
    if not isinstance(link, str | Mapping):
        return [f"{where} is {link!r}; it must be a name, an import path, or a mapping with a name"]
    name, options = _parts(link)
    if not isinstance(name, str) or not name:
        return [f"{where} has no name"]
    if ":" in name:
        return []
    if name not in LINKS:
        return [f"{where}: there is no link {name!r} (there are: {listed(LINKS)}, and import paths) {nearest(name, LINKS)}".rstrip()]
    unknown = [key for key in options if key not in _OPTIONS[name]]
    problems = [f"{where}: {name} has no option {key!r} (there are: {listed(_OPTIONS[name]) or 'none'})" for key in unknown]
    rank, alpha = options.get("rank", _RANK), options.get("alpha", 1.0)
    if not whole(rank) or rank < 1:
        problems.append(f"{where}: rank is {rank!r}; it must be a whole number from 1 on")
    if not finite(alpha) or alpha <= 0:
        problems.append(f"{where}: alpha is {alpha!r}; it must be a positive number")
    return problems


def _maker(link: str | Mapping[str, Any], context: BuildContext) -> Callable[[Tensor], nn.Module]:
    name, options = _parts(link)
    if name in LINKS:
        return partial(LINKS[name], **options, generator=context.generator)
    return partial(link_class(name, trusted=context.trusted), **options)


def _sizes(module: nn.Module) -> tuple[int, int]:
    inside, outside = matrix_sizes(module)
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return inside // groups, outside
