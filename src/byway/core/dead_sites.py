"""Dead sites: modules whose ``forward`` is never called, so that a side path on them would silently do nothing.

A site is dead if its parent has run since attach and the site itself has not (``nn.MultiheadAttention.out_proj``: the
parent reads the weight and never calls the module). The first forward of the root that finds one raises.

A branch that did not run at all (an encoder whose output was passed in) is no error, nor is a module that its parent
calls in another branch (LED's maps for global attention). Modules in a list or dict are not watched, since their parent
may choose among them, nor are embeddings, which ``inputs_embeds`` bypasses. Once every site has run, the hooks are
removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from byway.core.reads import uses
from byway.core.slots import base_modules, parent_path
from byway.errors import TargetError

__all__ = ["Watch"]

_CHOSEN_FROM = (nn.ModuleList, nn.ModuleDict)


class _Mark:
    """A forward hook that records that its module has run."""

    def __init__(self) -> None:
        self.ran = False

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran = True


class _Watched:
    def __init__(self, path: str, site: nn.Module, parent: nn.Module, name: str) -> None:
        self.names = {name}
        self.within, self.child = parent, path.rpartition(".")[2]
        self.own, self.parent = _Mark(), _Mark()
        self.kind = f"{type(parent).__name__}.{path.rpartition('.')[2]}"
        self.handles = (site.register_forward_hook(self.own), parent.register_forward_hook(self.parent))

    def is_dead(self) -> bool:
        """True if the parent has run and the site has not, unless the parent calls it in another branch."""
        return self.parent.ran and not self.own.ran and uses(self.within, self.child) != {"called"}

    def drop(self) -> None:
        for handle in self.handles:
            handle.remove()


class Watch:
    """The sites of one root that have not run yet."""

    def __init__(self) -> None:
        self.sites: dict[str, _Watched] = {}
        self.handle: RemovableHandle | None = None

    def add(self, model: nn.Module, name: str, paths: list[str]) -> None:
        """Watch `paths`, to which adapter `name` was just attached."""
        modules = dict(base_modules(model))
        for path in paths:
            if path in self.sites:
                self.sites[path].names.add(name)
                continue
            parent = modules[parent_path(path)] if path else None
            if parent is None or isinstance(parent, _CHOSEN_FROM) or isinstance(modules[path], nn.Embedding):
                continue
            self.sites[path] = _Watched(path, modules[path], parent, name)
        if self.sites and self.handle is None:
            self.handle = model.register_forward_hook(self._check)

    def remove(self, name: str) -> None:
        """Stop watching the sites that only adapter `name` has."""
        for path, watched in list(self.sites.items()):
            watched.names.discard(name)
            if not watched.names:
                self.sites.pop(path).drop()
        self._stop_if_done()

    def forget(self, path: str) -> None:
        """Stop watching a site whose side path also acts on code that reads its weight without calling it."""
        watched = self.sites.pop(path, None)
        if watched is not None:
            watched.drop()
            self._stop_if_done()

    def _check(self, module: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        dead = {path: watched for path, watched in self.sites.items() if watched.is_dead()}
        if dead:
            path, watched = next(iter(dead.items()))
            raise TargetError(
                f"{path!r} is never called: {watched.kind} is read directly by its parent, so a side path on it would do nothing"
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
