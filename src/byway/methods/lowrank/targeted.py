"""The base class of methods with a rank and with `targets`, `exclude` and `layers`.

It chooses the sites and leaves out those narrower than the rank. It has no fields: each method lists its own, in the
order in which the documentation shows them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from byway.core.method import Method, Placement
from byway.core.slots import Site

__all__ = ["TargetedMethod"]


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that adds an update of limited rank at sites that are chosen by name."""

    rank_name: ClassVar[str] = "rank"
    """Name of the rank in the note about modules that are narrower."""

    @abstractmethod
    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        """Return the sites that the fields select, and True if that is everything; append notes for the user to
        `notes`."""

    @abstractmethod
    def too_narrow(self, site: Site) -> bool:
        """True if the module is narrower than its rank."""

    def plan(self, model: nn.Module) -> Placement:
        notes: list[str] = []
        found, everything = self.chosen(model, notes)
        if not everything:
            return Placement(found, notes)
        # all-linear is not meant to include a gate with one output; check() refuses such a module if it is named
        narrow = [site.path for site in found if self.too_narrow(site)]
        if narrow:
            notes.append(f"left out, narrower than the {self.rank_name}: {', '.join(narrow[:3])}{' …' if len(narrow) > 3 else ''}")
        return Placement([site for site in found if site.path not in narrow], notes)
