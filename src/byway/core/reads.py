"""How a module's code uses its children: whether it calls them, or reads their weight or bias without calling them.

A side path on a child that is only read would do nothing. The source code tells most cases (Mamba's ``dt_proj``). A
child that is called in one branch and read in another (Jamba's ``dt_proj``; ``out_proj`` of Mamba's GPU kernels) is
tried: two tokens go through the model.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from byway.core.modes import modes_restored
from byway.core.slots import parent_path

__all__ = ["read_directly", "uses"]

_TENSORS = ("weight", "bias")
_READ = re.compile(rf"\bself\.(\w+)\.(?:{'|'.join(_TENSORS)})\b")
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model may raise when it is called without an input that it needs."""


def uses(parent: nn.Module, child: str) -> frozenset[str]:
    """Return how the methods of `parent` use its child: ``called``, ``read``, both or (unknown) none."""
    forward: Any = inspect.unwrap(type(parent).forward)
    if "forward" in vars(parent) or forward.__module__ not in {cls.__module__ for cls in type(parent).__mro__}:
        return frozenset()  # replaced by another library, as trl does
    found: set[str] = set()
    done: set[str] = set()
    for cls in type(parent).__mro__:
        if cls.__module__.startswith("torch."):
            continue
        for method, how in _methods(cls.__module__).get(cls.__qualname__, {}).items():
            if method not in done:
                done.add(method)
                found |= how.get(child, set())
    return frozenset(found)


def read_directly(model: Any, paths: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """Return those of `paths` whose parent reads their tensors and does not call them."""
    found: set[str] = set()
    unsure: dict[str, nn.Module] = {}
    for path in paths:
        parent, name = modules.get(parent_path(path), model), path.rpartition(".")[2]
        if isinstance(parent, nn.MultiheadAttention):
            found.add(path)
        elif not any(name in _read_names(cls.__module__) for cls in type(parent).__mro__):
            continue  # the usual case; nothing is parsed
        elif "read" in (how := uses(parent, name)):
            unsure |= {path: parent} if "called" in how else {}
            found |= set() if "called" in how else {path}
    return found | _tried(model, unsure, modules) if unsure else found


def _tried(model: Any, unsure: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> set[str]:
    """Return those of the children `unsure` that a forward pass does not call although their parents run."""
    if any(p.is_meta for p in model.parameters()):
        return set()
    ran: set[int] = set()
    watched = {id(module): module for path, parent in unsure.items() for module in (parent, modules[path])}
    handles = [module.register_forward_hook(lambda own, *_: ran.add(id(own))) for module in watched.values()]
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2]], device=device)
    given = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    named = {name: value for name, value in given.items() if name in inspect.signature(type(model).forward).parameters}
    try:
        with modes_restored(model), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            for parent in unsure.values():
                parent.training = True  # kernels that read weights may be used in training only
            model(**named)
    except _FAILURES:
        return set()  # it needs other inputs; a dead site is then found in the first forward pass
    finally:
        for handle in handles:
            handle.remove()
    return {path for path, parent in unsure.items() if id(parent) in ran and id(modules[path]) not in ran}


@cache
def _read_names(module: str) -> frozenset[str]:
    """Return the attributes of ``self`` whose weight or bias is named anywhere in a module's source."""
    return frozenset(_READ.findall(_source(module)))


@cache
def _methods(module: str) -> Mapping[str, Mapping[str, Mapping[str, set[str]]]]:
    """Return class → method → attribute of ``self`` → how it is used, of all classes at the top of a module."""
    classes = [node for node in ast.parse(_source(module)).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: {
            method.name: _used(method)
            for method in node.body
            if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "_init_weights", "init_mamba_weights")
        }
        for node in classes
    }


def _used(method: ast.FunctionDef) -> dict[str, set[str]]:
    above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    found: dict[str, set[str]] = {}
    for name, node in _attributes(method):
        around = above[node]
        if isinstance(around, ast.Call) and around.func is node:
            found.setdefault(name, set()).add("called")
        elif isinstance(around, ast.Attribute) and around.attr in _TENSORS and not _is_looked_at(above[around]):
            found.setdefault(name, set()).add("read")
    return found


def _attributes(method: ast.FunctionDef) -> Iterator[tuple[str, ast.Attribute]]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr, node


def _is_looked_at(around: ast.AST) -> bool:
    """True if only a tensor's type is used: ``isinstance(self.wo.weight, ...)``, ``self.wo.weight.dtype``."""
    if isinstance(around, ast.Attribute):
        return around.attr in ("dtype", "device", "shape")
    if isinstance(around, ast.Compare):
        return True
    return isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id == "isinstance"


def _source(module: str) -> str:
    """Return the source of an imported module; ``""`` if it has none (defined interactively, or compiled)."""
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""
