"""Mixed batches: each row goes through its own adapter (``adapter_names=[...]``); ``"__base__"`` means none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.layers import layer_of
from byway.compat.peft.session import Session
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath, slots
from byway.errors import AdapterError

__all__ = ["routed"]

BASE = "__base__"


class _Rows:
    """The rows of each adapter. In a batch k times as long as the names (beam search) each name has k rows."""

    def __init__(self, names: Sequence[str], *, repeats: bool) -> None:
        self.names = list(names)
        self.repeats = repeats

    def of(self, name: str, batch: int, device: torch.device | None = None) -> Tensor:
        """Return the indices of the rows of adapter `name`."""
        times, rest = divmod(batch, len(self.names))
        if rest or (times != 1 and not self.repeats):
            raise AdapterError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self.names)} and {batch}"
            )
        return torch.tensor([row for row in range(batch) if self.names[row // times] == name], dtype=torch.long, device=device)


class _Routed(SidePath):
    """Send each row of a module's batch through the side paths of its own adapter."""

    def __init__(self, rows: _Rows, sides: dict[str, list[SidePath]]) -> None:
        super().__init__()
        self.rows = rows
        self.by_name = sides  # a plain dict: these side paths belong to their slot

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        def act(sides: list[SidePath], own: dict[str, Any], part: Tensor) -> Tensor:
            for side in sides:
                part = side.after(own, part)
            return part

        return self._by_rows(inputs, out, act)

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        out = type(module).forward(module, **inputs)
        return self._by_rows(inputs, out, lambda sides, own, part: sides[0].instead(module, own).to(part.dtype))

    def _by_rows(self, inputs: dict[str, Any], out: Any, act: Callable[[list[SidePath], dict[str, Any], Tensor], Tensor]) -> Tensor:
        if not isinstance(out, Tensor):
            raise AdapterError("adapter_names: an adapted module does not return a tensor, so its rows cannot be told apart")
        batch = out.shape[0]
        for name, sides in self.by_name.items():
            rows = self.rows.of(name, batch, out.device)
            if len(rows):
                own = {k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == batch else v for k, v in inputs.items()}
                out = out.index_copy(0, rows, act(sides, own, out[rows]))
        return out


@contextmanager
def routed(session: Session, names: Sequence[str] | None, *, repeats: bool = False, batch: int | None = None) -> Iterator[None]:
    """Within this context row i of every batch goes through adapter ``names[i]``; None changes nothing.

    Raises:
        AdapterError: a name is unknown, the model is in training mode or merged, or an adapter has virtual tokens.
    """
    if names is None:
        yield
        return
    wanted = [name for name in dict.fromkeys(names) if name != BASE]
    unknown = [name for name in wanted if name not in session.peft_config]
    if unknown:
        raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    if session.model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = session.adapted_layers()
    if any(layer.merged for layer in layers):
        raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
    if any(session.peft_config[name].is_prompt_learning for name in wanted):
        raise AdapterError("adapter_names: prompts cannot be mixed in a batch")
    rows = _Rows(names, repeats=repeats)
    if batch is not None:
        rows.of(BASE, batch)
    try:
        for _, module, slot in slots(session.model):
            sides = [(name, side) for name, side in slot.sides() if name in wanted]
            if layer_of(module).disabled:
                continue
            if any(side.overrides(verb) for _, side in sides for verb in ("before", "attend")):
                raise AdapterError(f"adapter_names: {type(sides[0][1]).__name__} cannot be mixed in a batch")
            afters: dict[str, list[SidePath]] = {}
            for name, side in sides:
                if side.overrides("after"):
                    afters.setdefault(name, []).append(side)
            copies: dict[str, list[SidePath]] = {name: [side] for name, side in sides if isinstance(side, TrainedCopy)}
            slot.befores = slot.attends = ()
            slot.afters = (_Routed(rows, afters),) if afters else ()
            slot.answering = (_Routed(rows, copies),) if copies else ()
        yield
    finally:
        for layer in layers:
            layer.apply()
