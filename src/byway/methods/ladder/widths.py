"""The layers and widths of a side network; the reduction must divide the widths of the backbone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from byway.core.families import Facts, facts
from byway.core.families.blocks import KINDS, Kind
from byway.core.families.facts import find
from byway.core.slots import base_modules
from byway.core.targets.layers import choose_layers
from byway.core.weights import is_map, is_norm
from byway.errors import ConfigError, TargetError, listed

__all__ = ["Plan", "Stack", "plan", "shrunk"]

_TRIED = (8, 4, 2)
"""Default reductions: the first that divides the widths."""


@dataclass(frozen=True)
class Stack:
    """One stack of layers of a backbone, and the layers that get a side block."""

    name: str
    path: str
    """The module that runs the layers."""
    layers: tuple[str, ...]
    keep: tuple[int, ...]
    home: str
    """The pretrained model that is or contains the stack; its class builds the narrow copy."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided about a ladder before it is built."""

    kind: Kind
    stacks: tuple[Stack, ...]
    reduction: int
    config: Any
    note: str = ""


def plan(model: nn.Module, reduction: int | None, keep: Any, drop: Any) -> Plan:
    """Choose the stacks, the layers and the reduction.

    Raises:
        TargetError: ladders do not support the family, or `keep` / `drop` names layers that do not exist.
        ConfigError: the reduction does not divide the widths.
    """
    found = facts(model)
    kind = KINDS.get(found.model_type) or _alike(model, found)
    if kind is None:
        what = f"a {found.model_type!r} model" if found.model_type else type(model).__name__
        raise TargetError(f"no side blocks are known for {what} (there are: {listed(KINDS)})", "use another method for this model")
    if any(attention.cross for attention in kind.attentions) and "encoder" not in found.stacks:
        what = f"{type(model).__name__} is a decoder without the encoder that its layers attend to"
        raise TargetError(what, "use another method, or load it as the whole model")
    layers = {name: paths for name, paths in found.require("stacks").items() if paths}
    kept = _kept({name: len(paths) for name, paths in layers.items()}, keep, drop)
    stacks = tuple(Stack(n, found.stack_modules[n], tuple(paths), kept[n], _home(model, found, n)) for n, paths in layers.items())
    config = model.get_submodule(stacks[0].path).config
    for stack in stacks:
        if kind.attentions[-1].cross is False and vars(model.get_submodule(stack.path).config).get("add_cross_attention"):
            raise TargetError(f"{stack.path} has cross-attention, which a ladder does not support there", "use another method")
    chosen, note = _chosen(kind, config, reduction)
    if not kind.prunable:
        note = "; ".join(filter(None, (note, "side blocks start at random: which coordinates of a head belong together is not known")))
    return Plan(kind, stacks, chosen, config, note)


def _alike(model: nn.Module, found: Facts) -> Kind | None:
    """Return the kind whose maps are exactly those of an unlisted family's layers, and whose widths it configures."""
    if len(found.stacks) != 1 and set(found.stacks) != {"encoder", "decoder"}:
        return None
    for kind in dict.fromkeys(KINDS.values()):
        if found.stacks and all(_is_alike(model, kind, found.stack_modules[name], layers) for name, layers in found.stacks.items()):
            # how positions are rotated is not known, so not which coordinates belong together
            return replace(kind, prunable=False)
    return None


def _is_alike(model: nn.Module, kind: Kind, runner: str, layers: Sequence[str]) -> bool:
    """True if every layer of a stack has the maps of `kind`, and arguments are passed on as a ladder needs."""
    stack = model.get_submodule(runner)
    config: Any = vars(stack).get("config")
    parts = {name: part for name, part in stack.named_children() if is_norm(part) or "rotary" in name or "position" in name}
    passes_on = inspect.getsource(type(stack).forward).count("**kwargs") > 1  # takes them, and gives them to its layers
    if config is None or not passes_on or kind.exit is not None or kind.position_table is not None:
        return False
    if set(parts) != {name for name in (kind.final_norm, kind.rotary) if name is not None}:
        return False
    if kind.rotary is not None and set(inspect.signature(type(parts[kind.rotary]).forward).parameters) != {"self", "x", "position_ids"}:
        return False
    values, names = config.to_dict(), config.attribute_map
    fields = (kind.width, kind.feed_forward, *kind.feed_forward_too, "vocab_size", "num_attention_heads")
    if config.per_layer_attributes or not all(isinstance(values.get(names.get(name, name)), int) for name in fields):
        return False
    needed = {name for attention in kind.attentions if not attention.cross for name in vars(attention).values() if isinstance(name, str)}
    known = [find(name) for name in (*needed, *kind.ups, kind.down)]
    for module in (stack, *(model.get_submodule(layer) for layer in layers)):
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values()):
            return False  # the taps are passed on by keyword
        maps = {path for path, part in base_modules(module) if is_map(part)} if module is not stack else None
        if maps is not None and not (
            all(any(pattern.fullmatch(path) for pattern in known) for path in maps)
            and all(any(pattern.fullmatch(path) for path in maps) for pattern in known)
        ):
            return False
    return True


def _home(model: nn.Module, found: Facts, stack: str) -> str:
    from transformers import PreTrainedModel

    candidates = (found.stack_modules[stack], found.trunk)
    home = next((p for p in candidates if p is not None and isinstance(model.get_submodule(p), PreTrainedModel)), None)
    if home is None:
        raise TargetError(f"stack {stack!r} of {type(model).__name__} is in no transformers model", "use another method for this model")
    return home


def _kept(lengths: dict[str, int], keep: Any, drop: Any) -> dict[str, tuple[int, ...]]:
    everything = {name: set(range(n)) for name, n in lengths.items()}
    if keep is None and drop is None:
        chosen = everything
    else:
        chosen, problems = choose_layers(keep if keep is not None else drop, lengths, lengths)
        if problems:
            field = "keep" if keep is not None else "drop"
            raise TargetError("; ".join(problem.replace("layers ", f"{field} ", 1) for problem in problems))
        if keep is None:
            chosen = {name: everything[name] - chosen[name] for name in lengths}
    empty = [name for name, indices in chosen.items() if not indices]
    if empty:
        raise TargetError(f"no layer of the {empty[0]} gets a side block", "keep at least one layer in each stack")
    return {name: tuple(sorted(indices)) for name, indices in chosen.items()}


def _sizes(kind: Kind, config: Any) -> dict[str, int]:
    """Return the sizes that the reduction must divide: width, feed-forward width and head size.

    With rotary positions, the reduced head size must also be even.
    """
    width = getattr(config, kind.width)
    head = getattr(config, kind.head, None) if kind.head is not None else None
    sizes = {kind.width: width, "head size": head or width // config.num_attention_heads}
    inner = {name: getattr(config, name) for name in (kind.feed_forward, *kind.feed_forward_too)}
    return sizes | {name: size for name, size in inner.items() if size is not None}


def _chosen(kind: Kind, config: Any, wanted: int | None) -> tuple[int, str]:
    sizes = _sizes(kind, config)
    fit = [r for r in range(min(sizes.values()), 0, -1) if all(size % r == 0 for size in sizes.values())]
    fit = [r for r in fit if kind.rotary is None or sizes["head size"] // r % 2 == 0]
    if wanted is not None and wanted in fit:
        return wanted, ""
    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if wanted is not None:
        even = ", or leaves an odd head size, which rotary positions do not allow" if kind.rotary is not None else ""
        raise ConfigError(
            f"reduction {wanted} does not divide {said}{even}", f"the largest reductions that fit: {', '.join(map(str, fit[:4])) or 'none'}"
        )
    chosen = next((r for r in _TRIED if r in fit), None)
    if chosen is None:
        raise ConfigError(f"none of the reductions 8, 4 and 2 divides {said}", "set reduction: 1, or use another method for this model")
    return chosen, "" if chosen == _TRIED[0] else f"reduction {chosen}: 8 does not divide {said}" + (
        " into even head sizes" if kind.rotary is not None else ""
    )


def shrunk(kind: Kind, config: Any, reduction: int) -> Any:
    """Return a copy of `config` for a side network: widths divided, the same number of heads, a vocabulary of one."""
    sizes = _sizes(kind, config)
    small = copy.deepcopy(config)
    small.vocab_size = 1
    small.pad_token_id = None if kind.same_as_width == () else 0
    setattr(small, kind.width, sizes[kind.width] // reduction)
    for name in kind.same_as_width:
        setattr(small, name, sizes[kind.width] // reduction)
    for name in (kind.feed_forward, *kind.feed_forward_too):
        if name in sizes:
            setattr(small, name, sizes[name] // reduction)
    if kind.head is not None:
        setattr(small, kind.head, sizes["head size"] // reduction)
    return small
