"""Dead sites: a module whose ``forward`` nobody calls, so that a side path on it would do nothing and nobody would notice.

A site is dead when its parent module has run and the site itself has not, counted since attach (``nn.MultiheadAttention.out_proj``: the
parent reads the weight and never calls the module). The first forward of the root that sees this raises. A branch that did not run at all
(an encoder whose output was passed in) is no error, and modules kept in a list or a dict are chosen by their parent, so they are not
watched; nor are embeddings, which ``inputs_embeds`` passes by. Once every site has been seen to run, the counting hooks are gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from byway.core.slots import base_modules, parent_path
from byway.errors import TargetError

__all__ = ["Watch"]

_CHOSEN_FROM = (nn.ModuleList, nn.ModuleDict)


class _Mark:
    """A forward hook that remembers that its module has run."""

    def __init__(self) -> None:
        self.ran = False

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran = True


class _Watched:
    def __init__(self, path: str, site: nn.Module, parent: nn.Module, names: set[str]) -> None:
        self.path = path
        self.names = names
        self.own, self.parent = _Mark(), _Mark()
        self.kind = f"{type(parent).__name__}.{path.rpartition('.')[2]}"
        self.handles = (site.register_forward_hook(self.own), parent.register_forward_hook(self.parent))

    def drop(self) -> None:
        for handle in self.handles:
            handle.remove()


class Watch:
    """The sites of one root that have not been seen to run yet."""

    def __init__(self) -> None:
        self.sites: dict[str, _Watched] = {}
        self.handle: RemovableHandle | None = None

    def add(self, model: nn.Module, name: str, paths: list[str]) -> None:
        """Watch `paths`, which adapter `name` has just been attached to."""
        modules = dict(base_modules(model))
        for path in paths:
            if path in self.sites:
                self.sites[path].names.add(name)
                continue
            parent = modules[parent_path(path)] if path else None
            if parent is None or isinstance(parent, _CHOSEN_FROM) or isinstance(modules[path], nn.Embedding):
                continue
            self.sites[path] = _Watched(path, modules[path], parent, {name})
        if self.sites and self.handle is None:
            self.handle = model.register_forward_hook(self._check)

    def remove(self, name: str) -> None:
        """Forget what only adapter `name` needed."""
        for path, watched in list(self.sites.items()):
            watched.names.discard(name)
            if not watched.names:
                self.sites.pop(path).drop()
        self._stop_if_done()

    def _check(self, module: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        dead = [w for w in self.sites.values() if w.parent.ran and not w.own.ran]
        if dead:
            raise TargetError(
                f"{dead[0].path!r} is never called: {dead[0].kind} is read directly by its parent, so a side path on it would do nothing"
                + (f" ({len(dead) - 1} more such modules)" if len(dead) > 1 else ""),
                "detach and leave it out (exclude=[...])",
            )
        for path in [path for path, w in self.sites.items() if w.own.ran]:
            self.sites.pop(path).drop()
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if not self.sites and self.handle is not None:
            self.handle.remove()
            self.handle = None
