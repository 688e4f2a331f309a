"""Count the bytes of live tensors during a computation: now, and the peak since the last call.

On a GPU torch's allocator counts. On a CPU every operation is watched: a storage is alive from the operation that
creates it until it is freed. Scratch memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["live"]


@contextmanager
def live(model: nn.Module, given: Mapping[str, Any]) -> Iterator[_Allocator | _Watch]:
    """Within this context count the bytes alive besides the model, its gradients and the batch `given`.

    Yields an object with ``now()``, the bytes alive now, and ``peak()``, the peak since its last call.
    """
    own = [*model.parameters(), *model.buffers(), *(v for v in given.values() if isinstance(v, Tensor))]
    own += [p.grad for p in model.parameters() if p.grad is not None]
    device = next(model.parameters()).device
    if device.type == "cuda":
        yield _Allocator(device)
        return
    with _Watch(own) as watch:
        yield watch


class _Allocator:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.before

    def peak(self) -> int:
        found = torch.cuda.max_memory_allocated(self.device) - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


class _Watch(TorchDispatchMode):
    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = 0
        self.most = 0
        self.known: dict[int, int] = {}
        for tensor in own:
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = 0

    def now(self) -> int:
        return self.alive

    def peak(self) -> int:
        found, self.most = self.most, self.alive
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.is_meta:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known[key] = storage.nbytes()
                self.alive += self.known[key]
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._freed, key).atexit = False
        return out

    def _freed(self, key: int) -> None:
        self.alive -= self.known.pop(key, 0)
