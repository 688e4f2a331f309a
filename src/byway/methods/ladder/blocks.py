"""Side blocks: the backbone's own layer classes, built from its configuration with smaller widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from byway.core.weights import device_of
from byway.methods.ladder.widths import Plan, Stack, shrunk

__all__ = ["Twin", "build"]


@dataclass(frozen=True)
class Twin:
    """The narrow twin of one stack: only what the ladder uses of it."""

    blocks: dict[int, nn.Module]
    """Layer → its side block, for the layers that are kept."""
    norm: nn.Module | None
    norm_name: str
    exit: nn.Module | None
    """The backbone's own map to the width that the head reads."""
    rotary: nn.Module | None
    config: Any


def build(model: nn.Module, plan: Plan, stack: Stack, generator: torch.Generator) -> Twin:
    """A whole narrow backbone of the same class, of which the kept layers, the last norm and the rotary embedding are taken.

    Its start is the one the model's own class gives (``_init_weights``). On a meta device nothing is allocated.
    """
    home = model.get_submodule(stack.home)
    own = model.get_submodule(stack.path)
    small = shrunk(plan.kind, own.config, plan.reduction)
    meta = device_of(model.get_submodule(stack.layers[0])).type == "meta"
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        whole: Any = type(home)(small)
    inside = stack.path.removeprefix(stack.home).removeprefix(".")
    narrow = whole.get_submodule(inside)
    layers = [narrow.get_submodule(path.removeprefix(stack.path).removeprefix(".")) for path in stack.layers]
    blocks = {index: layers[index] for index in stack.keep}
    for place, block in enumerate(blocks.values()):
        _renumber(block, len(layers) + place)
        if not plan.kind.key_bias:
            _without_key_bias(plan, block)
    _move_position_table(plan, layers, blocks)
    parts = dict(narrow.named_children())
    norm = parts.get(plan.kind.final_norm) if plan.kind.final_norm is not None else None
    rotary = parts.get(plan.kind.rotary) if plan.kind.rotary is not None else None
    leave = own._modules.get(plan.kind.exit) if plan.kind.exit is not None else None
    return Twin(blocks, norm, plan.kind.final_norm or "", leave, rotary, small)


def _renumber(block: nn.Module, index: int) -> None:
    """Its keys and values lie behind those of the backbone in the same cache."""
    for module in block.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] = index


def _without_key_bias(plan: Plan, block: nn.Module) -> None:
    for attention in plan.kind.attentions:
        block.get_submodule(attention.key).register_parameter("bias", None)


def _move_position_table(plan: Plan, layers: list[nn.Module], blocks: dict[int, nn.Module]) -> None:
    """Only one block owns relative positions and hands them on: the first that is kept."""
    table = plan.kind.position_table
    if table is None or 0 in blocks:
        return
    place, _, name = table.rpartition(".")
    first: Any = next(iter(blocks.values())).get_submodule(place)
    first.has_relative_attention_bias = True
    first.add_module(name, layers[0].get_submodule(table))
