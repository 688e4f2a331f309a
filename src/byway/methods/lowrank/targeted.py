"""What the methods with `targets`, `exclude` and `layers` and a rank have in common: the sites, without those narrower than the rank.

It has no fields: each method lists its own, in the order in which a reader is to meet them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from byway.core.method import Method
from byway.core.slots import Site

__all__ = ["TargetedMethod"]


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method whose sites are chosen by name, and which takes part of a matrix at each."""

    rank_name: ClassVar[str] = "rank"
    """What the rank is called where modules are left out because they are narrower."""

    @abstractmethod
    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        """(what the fields select, whether that is simply everything); what the user should know is appended to `notes`."""

    @abstractmethod
    def too_narrow(self, site: Site) -> bool:
        """Whether the module is narrower than the rank at it."""

    def sites(self, model: nn.Module) -> Iterator[Site]:
        yield from self._resolve(model, [])

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        notes: list[str] = []
        self._resolve(model, notes)
        return tuple(notes)

    def _resolve(self, model: nn.Module, notes: list[str]) -> list[Site]:
        found, everything = self.chosen(model, notes)
        if not everything:
            return found
        # whoever asks for everything does not mean a gate with one output; a module asked for by name is refused instead
        narrow = [site.path for site in found if self.too_narrow(site)]
        if narrow:
            notes.append(f"left out, narrower than the {self.rank_name}: {', '.join(narrow[:3])}{' …' if len(narrow) > 3 else ''}")
        return [site for site in found if site.path not in narrow]
