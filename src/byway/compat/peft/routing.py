"""Mixed batches: each row of a batch goes through an adapter of its own (``adapter_names=[...]``), ``"__base__"`` through none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.merging import merged_somewhere
from byway.compat.peft.session import Session
from byway.compat.peft.state import layer_of
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath, Slot
from byway.errors import AdapterError

__all__ = ["BASE", "routed"]

BASE = "__base__"


class _Rows:
    """Which rows of a batch belong to which adapter; a batch that is a multiple of the names (beam search) repeats each in place."""

    def __init__(self, names: Sequence[str], *, repeats: bool) -> None:
        self.names = list(names)
        self.repeats = repeats

    def of(self, name: str, batch: int, device: torch.device) -> Tensor:
        times, rest = divmod(batch, len(self.names))
        if rest or (times != 1 and not self.repeats):
            raise AdapterError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self.names)} and {batch}"
            )
        return torch.tensor([row for row in range(batch) if self.names[row // times] == name], dtype=torch.long, device=device)


class _RoutedAfter(SidePath):
    """Each row's own side paths, one adapter at a time."""

    def __init__(self, rows: _Rows, sides: dict[str, list[SidePath]]) -> None:
        super().__init__()
        self.rows = rows
        self.by_name = sides  # a plain dict: these side paths belong to their slot

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        if not isinstance(out, Tensor):
            raise AdapterError("adapter_names: a module that does not return a tensor cannot answer for single rows")
        batch = out.shape[0]
        for name, sides in self.by_name.items():
            rows = self.rows.of(name, batch, out.device)
            if not len(rows):
                continue
            own = {k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == batch else v for k, v in inputs.items()}
            part = out[rows]
            for side in sides:
                part = side.after(own, part)
            out = out.index_copy(0, rows, part)
        return out


class _RoutedInstead(SidePath):
    """Each row through its adapter's copy of the module, or through the module itself."""

    def __init__(self, rows: _Rows, copies: dict[str, TrainedCopy]) -> None:
        super().__init__()
        self.rows = rows
        self.by_name = copies

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        out = type(module).forward(module, **inputs)
        if not isinstance(out, Tensor):
            raise AdapterError(f"adapter_names: a {type(module).__name__} does not return a tensor and cannot answer for single rows")
        batch = out.shape[0]
        for name, side in self.by_name.items():
            rows = self.rows.of(name, batch, out.device)
            if len(rows):
                own = {k: v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == batch else v for k, v in inputs.items()}
                out = out.index_copy(0, rows, side.instead(module, own).to(out.dtype))
        return out


@contextmanager
def routed(session: Session, names: Sequence[str] | None, *, repeats: bool = False, batch: int | None = None) -> Iterator[None]:
    """Within this context row i of every batch goes through adapter ``names[i]``; None changes nothing.

    Raises:
        AdapterError: an unknown name, training mode, a merged model, or an adapter that does not act after its module (a prompt).
    """
    if names is None:
        yield
        return
    _check(session, names)
    rows = _Rows(names, repeats=repeats)
    if batch is not None:
        rows.of(BASE, batch, torch.device("cpu"))
    there = list(session.slots())
    try:
        for _, module, slot in there:
            if not layer_of(module).disabled:
                _route(slot, rows, [name for name in dict.fromkeys(names) if name != BASE])
        yield
    finally:
        for _, module, slot in there:
            layer_of(module).apply(slot)


def _check(session: Session, names: Sequence[str]) -> None:
    unknown = sorted({name for name in names if name != BASE} - set(session.configs))
    if unknown:
        raise AdapterError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if session.model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    if merged_somewhere(session.model):
        raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
    if any(session.configs[name].is_prompt_learning for name in names if name != BASE):
        raise AdapterError("adapter_names: prompts cannot be mixed in a batch")


def _route(slot: Slot, rows: _Rows, names: Sequence[str]) -> None:
    own = [(name, side) for name, side in slot.sides() if name in names]
    for verb in ("before", "attend"):
        if any(side.overrides(verb) for _, side in own):
            raise AdapterError(f"adapter_names: {type(own[0][1]).__name__} cannot be mixed in a batch")
    afters: dict[str, list[SidePath]] = {}
    for name, side in own:
        if side.overrides("after"):
            afters.setdefault(name, []).append(side)
    copies = {name: side for name, side in own if isinstance(side, TrainedCopy)}
    slot.befores = slot.attends = ()
    slot.afters = (_RoutedAfter(rows, afters),) if afters else ()
    slot.answering = (_RoutedInstead(rows, copies),) if copies else ()
