"""Side blocks: the backbone's own layer classes, built from its configuration with smaller widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from byway.core.slots import base_modules
from byway.core.weights import device_of, features, is_linear
from byway.errors import TargetError
from byway.methods.ladder.widths import Plan, Stack, shrunk

__all__ = ["Twin", "build"]


@dataclass(frozen=True)
class Twin:
    """The parts of a narrow copy of one stack that the ladder uses."""

    blocks: dict[int, nn.Module]
    """Layer → its side block, for the kept layers."""
    norm: nn.Module | None
    norm_name: str
    exit: nn.Module | None
    """The backbone's own map to the width that the head reads."""
    rotary: nn.Module | None
    config: Any


def build(model: nn.Module, plan: Plan, stack: Stack, generator: torch.Generator) -> Twin:
    """Build a narrow backbone of the same class; return its kept layers, last norm and rotary embedding.

    The weights are those that the model's own class initializes (``_init_weights``). On a meta device nothing is
    allocated.
    """
    home = model.get_submodule(stack.home)
    own = model.get_submodule(stack.path)
    small = _narrowed(home, plan, own.config)
    meta = device_of(model.get_submodule(stack.layers[0])).type == "meta"
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        whole: Any = type(home)(small)
    inside = stack.path.removeprefix(stack.home).removeprefix(".")
    narrow = whole.get_submodule(inside)
    layers = [narrow.get_submodule(path.removeprefix(stack.path).removeprefix(".")) for path in stack.layers]
    blocks = {index: layers[index] for index in stack.keep}
    _check(model.get_submodule(stack.layers[stack.keep[0]]), blocks[stack.keep[0]], plan.reduction)
    for place, block in enumerate(blocks.values()):
        for module in block.modules():
            if "layer_idx" in vars(module):  # in the cache, its keys and values come after those of the backbone
                vars(module)["layer_idx"] = len(layers) + place
        if not plan.kind.key_bias:
            present = {path for path, _ in block.named_modules()}
            for attention in (attention for attention in plan.kind.attentions if attention.key in present):
                block.get_submodule(attention.key).register_parameter("bias", None)
    table = plan.kind.position_table
    if table is not None and 0 not in blocks:
        # the first kept block computes the relative position bias and hands it on
        path, _, name = table.rpartition(".")
        owner: Any = next(iter(blocks.values())).get_submodule(path)
        owner.has_relative_attention_bias = True
        owner.add_module(name, layers[0].get_submodule(table))
    parts = dict(narrow.named_children())
    norm = parts.get(plan.kind.final_norm) if plan.kind.final_norm is not None else None
    rotary = parts.get(plan.kind.rotary) if plan.kind.rotary is not None else None
    leave = own._modules.get(plan.kind.exit) if plan.kind.exit is not None else None
    return Twin(blocks, norm, plan.kind.final_norm or "", leave, rotary, small)


def _narrowed(home: Any, plan: Plan, config: Any) -> Any:
    """Return the configuration of the narrow copy. Raises TargetError if its class does not allow such values."""
    try:
        return shrunk(plan.kind, config, plan.reduction)
    except (ValueError, TypeError) as failure:
        raise TargetError(
            f"no side blocks for {type(home).__name__}: its configuration cannot be narrowed ({failure})",
            "use another method for this model",
        ) from failure


def _check(block: nn.Module, narrow: nn.Module, reduction: int) -> None:
    """Raise TargetError unless every map of `narrow` has the widths of that in `block`, divided by `reduction`."""
    wide = dict(base_modules(block))
    for path, module in narrow.named_modules():
        if is_linear(module) and tuple(reduction * size for size in features(module)) != features(wide[path]):
            raise TargetError(
                f"no side blocks for {type(block).__name__}: with narrower settings {path!r} has {features(module)} features "
                f"(in, out), not {features(wide[path])} divided by {reduction}",
                "use another method for this model",
            )
