"""How a ladder reads its backbone: at each rung what entered the block and what left it, without a graph.

One :class:`Taps` is made per forward of a stack and travels with the stack's own keyword arguments, so that no module keeps a tensor: an
exception, a second thread or a nested call leaves nothing behind. Everything the backbone computes is a function of detached inputs and
frozen tensors, so autograd records nothing there and no activation is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import Ref, SidePath, slots
from byway.errors import AdapterError

__all__ = ["KEY", "Entrance", "Tap", "Taps", "trained_inside"]

KEY = "byway_taps"
"""The keyword under which the taps travel; attention functions ignore what they do not know."""


class Taps:
    """What one forward of a stack left for the ladder. Not a tuple, list or dict, so that nothing that maps over tensors copies it."""

    __slots__ = ("encoder", "entrance", "rungs")

    def __init__(self) -> None:
        self.entrance: Tensor | None = None
        """e (b, t, d): what enters block 0."""
        self.rungs: dict[int, tuple[dict[str, Any], Tensor]] = {}
        """Layer → (the block's arguments by name, b_i (b, t, d))."""
        self.encoder: Tensor | None = None
        """(b, u, d_s): the side encoder's output, for a decoder."""


class Tap(SidePath):
    """Reads the output of one block; trains nothing and changes nothing."""

    def __init__(self, index: int, stack: nn.Module) -> None:
        super().__init__()
        self.index = index
        self.stack = Ref(stack)

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
    """The tap at block 0, which also reads and detaches what enters it.

    transformers' switch for activation checkpointing makes the embedding's output require a gradient; nothing of that passes this point.
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
    """The adapters that train something in `stack` (not at the stack itself, where ladders hang)."""
    inside = (
        name for path, _, slot in slots(stack) if path for name, side in slot.sides() if any(p.requires_grad for p in side.parameters())
    )
    return list(dict.fromkeys(inside))


def _refuse(stack: nn.Module) -> None:
    names = [] if torch.compiler.is_compiling() else trained_inside(stack)
    what = f"adapter {names[0]!r}" if names else "something in the backbone"
    raise AdapterError(
        f"{what} is trained below a ladder, which passes no gradient to the backbone: it would never learn",
        "train it first and load it without trainable=True, or leave it out; heads above the ladder may be trained",
    )
