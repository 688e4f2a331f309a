r"""A chain of weight transforms: y = W'x + b, W' = f_k(… f_2(f_1(W))).

::

    W (frozen) ── f_1 ── f_2 ── … ── f_k ── W'        each f: matrix ↦ matrix of the same shape, trained
    x ──────────────────────────────────── W'x + b    computed as Wx + b + (W' − W)x

``low_rank`` then ``magnitude`` is DoRA; the reverse order is a different function. Additive transforms commute with
each other, normalizing ones with nothing. Source: torch's parametrizations, and minLoRA for low-rank ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import MinLen
from torch import Tensor, nn

from byway.core.fields import Layers, Positive, Rank, wrong
from byway.core.method import BuildContext
from byway.core.slots import SidePath, Site
from byway.core.targets.resolve import resolve
from byway.core.targets.search import ALL_LINEAR
from byway.errors import TargetError, listed, nearest
from byway.methods.lowrank.chain import LINKS, Chain, link_class
from byway.methods.lowrank.initialization import matrix_sizes
from byway.methods.lowrank.method import adaptable
from byway.methods.lowrank.targeted import TargetedMethod

__all__ = ["WeightChain"]

_OPTIONS: Mapping[str, Mapping[str, Any]] = {"low_rank": {"rank": Rank, "alpha": Positive}, "magnitude": {}}
"""Link → its options and their types."""
_RANK = 8


@dataclass(frozen=True, kw_only=True)
class WeightChain(TargetedMethod):
    """An ordered chain of trained weight transforms on linear maps, embeddings and convolutions.

    Attaching leaves the output unchanged if every link starts as the identity, as Byway's own links do.

    Raises:
        ConfigError: an unknown link, an option out of range, or a class that cannot be imported.
        TargetError: something named is not in the model, or a link changes the shape of its matrix.
    """

    links: Annotated[Sequence[str | Mapping[str, Any]], MinLen(1)] = ("low_rank", "magnitude")
    """Transforms of the weight, in order: ``low_rank`` (options rank, alpha), ``magnitude``, or the import path of your
    own ``nn.Module``, ``mypackage.links:Mine``, which is constructed with the matrix. A link with options is a map:
    ``{name: low_rank, rank: 4}``."""
    targets: str | Sequence[str] | None = None
    """Modules to adapt: ``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list of
    names; null: chosen by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    mergeable: ClassVar[bool] = True

    def contradictions(self) -> list[str]:
        return [f"links[{number}]{problem}" for number, link in enumerate(self.links) for problem in _problems(link)]

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=adaptable, notes=notes)
        return found, self.targets == ALL_LINEAR

    def too_narrow(self, site: Site) -> bool:
        return self._rank() > min(_sizes(site.module))

    def _rank(self) -> int:
        """Return the largest rank of a link; 0 if no link has one."""
        return max((options.get("rank", _RANK) for name, options in map(_parts, self.links) if name == "low_rank"), default=0)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            smaller = min(_sizes(site.module))
            if self._rank() > smaller:
                raise TargetError(f"rank {self._rank()} is more than {site.path} can use", f"choose a rank of at most {smaller}")

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return Chain(site.module, [_maker(link, context) for link in self.links], site.path)


def _parts(link: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a link."""
    if isinstance(link, str):
        return link, {}
    return link.get("name", ""), {key: value for key, value in link.items() if key != "name"}


def _problems(link: str | Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a link, each as the end of a message that begins with ``links[i]``."""
    name, options = _parts(link)
    if not isinstance(name, str) or not name:
        return [" has no name"]
    if ":" in name:
        return []
    if name not in LINKS:
        return [f": there is no link {name!r} (there are: {listed(LINKS)}, and import paths) {nearest(name, LINKS)}".rstrip()]
    known = _OPTIONS[name]
    problems = [f": {name} has no option {key!r} (there are: {listed(known) or 'none'})" for key in options if key not in known]
    return problems + [f": {key}{why}" for key, value in options.items() if key in known for why, _ in wrong(known[key], value)]


def _maker(link: str | Mapping[str, Any], context: BuildContext) -> Callable[[Tensor], nn.Module]:
    name, options = _parts(link)
    if name in LINKS:
        return partial(LINKS[name], **options, generator=context.generator)
    return partial(link_class(name, trusted=context.trusted), **options)


def _sizes(module: nn.Module) -> tuple[int, int]:
    inside, outside = matrix_sizes(module)
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return inside // groups, outside
