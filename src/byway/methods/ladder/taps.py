"""The side paths with which a ladder reads the input and output of each block of its backbone, without a graph.

Each forward of a stack has its own :class:`Taps`, passed along in the stack's keyword arguments. No module keeps a
tensor, so an exception, a second thread or a nested call leaves no state behind. The backbone computes from detached
inputs and frozen tensors only, so autograd records nothing there and keeps no activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import ModuleRef, SidePath, slots
from byway.errors import AdapterError

__all__ = ["KEY", "Entrance", "Tap", "Taps", "trained_inside"]

KEY = "byway_taps"
"""Keyword argument that carries the taps; attention functions ignore unknown ones."""


class Taps:
    """The tensors that one forward of a stack provides to the ladder.

    It is not a tuple, list or dict, so that code that maps over tensors does not copy it.
    """

    __slots__ = ("encoder", "entrance", "rungs")

    def __init__(self) -> None:
        self.entrance: Tensor | None = None
        """e (b, t, d), the input of block 0."""
        self.rungs: dict[int, tuple[dict[str, Any], Tensor]] = {}
        """Layer → (the block's arguments by name, b_i (b, t, d))."""
        self.encoder: Tensor | None = None
        """(b, u, d_s), the output of the side encoder, for a decoder."""


class Tap(SidePath):
    """Read the output of one block; it trains nothing and changes nothing."""

    def __init__(self, index: int, stack: nn.Module) -> None:
        super().__init__()
        self.index = index
        self.stack = ModuleRef(stack)

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        taps = inputs.get(KEY)
        if taps is None:
            return out
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            _refuse(self.stack.module)
        taps.rungs[self.index] = (inputs, hidden)
        return out


class Entrance(Tap):
    """The tap at block 0, which also reads and detaches its input.

    transformers' activation checkpointing makes the output of the embedding require a gradient; that ends here.
    """

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        taps = inputs.get(KEY)
        if taps is None:
            return inputs
        name = next(iter(inputs))
        hidden = inputs[name]
        if hidden.requires_grad and not torch.compiler.is_compiling() and trained_inside(self.stack.module):
            _refuse(self.stack.module)
        taps.entrance = hidden.detach()
        return {**inputs, name: taps.entrance}


def trained_inside(stack: nn.Module) -> list[str]:
    """Return the adapters that train something inside `stack`, not at the stack itself, where ladders are attached."""
    inside = (
        name for path, _, slot in slots(stack) if path for name, side in slot.sides() if any(p.requires_grad for p in side.parameters())
    )
    return list(dict.fromkeys(inside))


def _refuse(stack: nn.Module) -> None:
    names = [] if torch.compiler.is_compiling() else trained_inside(stack)
    what = f"adapter {names[0]!r}" if names else "something in the backbone"
    raise AdapterError(
        f"{what} is trained below a ladder, which passes no gradient to the backbone",
        "train it first and load it without trainable=True, or leave it out; heads above the ladder may be trained",
    )
