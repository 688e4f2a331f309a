"""What a shortcut passes by, found out by running it once on one document: forms, widths, dtypes, and every tensor that has a say."""

from __future__ import annotations

import contextvars
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from byway.base.arithmetic.int8 import in_int8
from byway.base.fingerprint import NOT_ARCHITECTURE
from byway.core.adapter import adapters
from byway.core.attention import packed
from byway.core.slots import base_modules, slot_of, slots
from byway.core.weights import is_quantized
from byway.engine.attention.packing import packing
from byway.engine.attention.unpack import longest
from byway.engine.cache.shortcut import Given, Reached, Shortcut, capturing
from byway.errors import AdapterError

__all__ = ["Survey", "computing", "run", "survey"]


@dataclass(frozen=True)
class Survey:
    """A shortcut of one model, with everything about the model that the cached states depend on."""

    shortcut: Shortcut
    given: Mapping[str, Given]
    """By path, for the modules that give and those that are skipped."""
    rows: int
    """States of the document that was looked at."""
    images: bool
    """Whether documents are no token ids, so that a batch's shape does not say how many states there are."""
    weighed: Callable[[], dict[str, str]]
    """:attr:`depends`, not yet worked out."""

    @cached_property
    def depends(self) -> Mapping[str, str]:
        """What the states depend on, besides the documents: names → values, for the key and for people. Reads every tensor below once."""
        return self.weighed()

    @property
    def width(self) -> int:
        """Numbers that are kept for each token."""
        return sum(self.given[path].width for path in self.shortcut.gives)


def survey(model: nn.Module, shortcut: Shortcut, inputs: Mapping[str, Any]) -> Survey:
    """Run `inputs` (one document) through the trunk and look.

    Raises:
        AdapterError: a layer hands on more than hidden states.
    """
    outs: dict[str, Any] = {}
    calls: dict[str, int] = {}
    started: dict[str, None] = {}
    finished: dict[str, None] = {}
    before: list[tuple[set[str], set[str]]] = [(set(), set())]

    def seen(path: str, out: Any) -> None:
        outs[path] = out
        calls[path] = calls.get(path, 0) + 1
        if path == shortcut.gives[-1]:
            before[0] = (set(started), set(finished))

    with ExitStack() as stack:
        for path, module in base_modules(model):
            stack.enter_context(_told(module, path, started, finished))
        stack.enter_context(capturing(model, dict.fromkeys((*shortcut.skips, *shortcut.gives), 0), seen, _go_on))
        stack.callback(model.get_submodule(shortcut.runner).register_forward_hook(_stop, prepend=True).remove)
        run(model, inputs)
    missing = [path for path in (*shortcut.skips, *shortcut.gives) if path not in outs]
    if missing:
        raise AdapterError(f"{missing[0]} does not run on these inputs")
    given = {path: _given(path, out, calls[path]) for path, out in outs.items()}
    last = outs[shortcut.gives[-1]]
    rows = int((last if isinstance(last, Tensor) else last[0]).shape[1])
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape[1] != rows:
        raise AdapterError(f"the layers see {rows} positions for {ids.shape[1]} tokens: something adds tokens to the input")
    started_by_then, finished_by_then = before[0]
    whole = finished_by_then | set(shortcut.skips) | set(shortcut.gives)
    return Survey(shortcut, given, rows, ids is None, partial(_depends, model, whole, started_by_then - whole))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One forward of the trunk on `inputs` in evaluation mode, without a graph, until :class:`Reached`; no generator is moved on.

    It is the same in whatever scope it is called for: inside ``packed()``, inside ``disabled(model)``.
    """
    contextvars.Context().run(_run, model, inputs)


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with computing(model), suppress(Reached), ExitStack() as stack:
        if "cu_seq_lens_q" in inputs:
            stack.enter_context(packing(model))
            stack.enter_context(packed(longest(inputs)))
        model(**{**options, **inputs})


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Within this context everything is in evaluation mode and without a graph; modes and generators are then as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _go_on() -> None:
    pass


def _stop(module: nn.Module, args: Any, out: Any) -> None:
    raise Reached


@contextmanager
def _told(module: nn.Module, path: str, started: dict[str, None], finished: dict[str, None]) -> Iterator[None]:
    handles = (
        module.register_forward_pre_hook(lambda *_: started.setdefault(path)),
        module.register_forward_hook(lambda *_: finished.setdefault(path)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- forms


def _given(path: str, out: Any, calls: int) -> Given:
    from transformers.utils.generic import ModelOutput

    if isinstance(out, Tensor):
        return Given(path, "tensor", _bare, out.shape[-1], out.dtype, calls)
    if isinstance(out, ModelOutput) and isinstance(out.get("last_hidden_state"), Tensor) and len(out) == 1:
        hidden = out["last_hidden_state"]
        return Given(path, "output", _as_output(type(out)), hidden.shape[-1], hidden.dtype, calls)
    if isinstance(out, tuple) and isinstance(out[0], Tensor) and all(entry is None for entry in out[1:]):
        return Given(path, "tuple", _as_tuple(len(out)), out[0].shape[-1], out[0].dtype, calls)
    raise AdapterError(f"{path} hands on more than hidden states")


def _bare(states: Tensor) -> Tensor:
    return states


def _as_output(kind: Any) -> Callable[[Tensor], Any]:
    return lambda states: kind(last_hidden_state=states)


def _as_tuple(length: int) -> Callable[[Tensor], Any]:
    return lambda states: (states, *(None for _ in range(length - 1)))


# ---------------------------------------------------------------- what the states depend on


def _depends(model: nn.Module, whole: set[str], around: set[str]) -> dict[str, str]:
    """`whole`: modules that have a say with everything below them; `around`: modules of which only their own tensors do."""
    import transformers

    state = hashlib.sha256()
    frozen: set[str] = set()
    roots = {path for path in whole if not any(other != path and _inside(path, other) for other in whole)}
    for path, module in base_modules(model):
        if not (path in around or any(_inside(path, root) for root in roots)):
            continue
        for name, tensor in _own_tensors(module):
            _add(state, f"{path}.{name}", tensor)
    for path, _, slot in slots(model):
        if path in around or any(_inside(path, root) for root in roots):
            for name, side in slot.sides():
                if name in slot.active and not side.learns():
                    frozen.add(name)
                    for own, tensor in side.state_dict().items():
                        _add(state, f"{path}.{name}.{own}", tensor)
    config: Any = vars(model).get("config")
    fields = "" if config is None else json.dumps(_fields(config.to_dict()), sort_keys=True, default=str)
    attention = str(config._attn_implementation).replace("byway_packed_", "").replace("byway_", "") if config is not None else ""
    device = next(model.parameters()).device
    known = adapters(model)
    products = {"products": "int8"} if in_int8(model) else {}
    return {
        **products,
        "weights": state.hexdigest(),
        "adapters": "; ".join(f"{name}: {known[name].method!r}" for name in sorted(frozen)),
        "model": type(model).__name__,
        "config": hashlib.sha256(fields.encode()).hexdigest(),
        "attention": attention,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "precision": torch.get_float32_matmul_precision(),
        # which partial sums are made depends on how the work is divided
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
    }


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides the computation."""
    kept = {name: value for name, value in config.items() if name not in NOT_ARCHITECTURE and "dropout" not in name}
    return {name: _fields(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _inside(path: str, module: str) -> bool:
    return module in ("", path) or path.startswith(f"{module}.")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of this module itself; of a quantized one what it is stored as."""
    if is_quantized(module):
        slot = slot_of(module)
        prefix = "byway." if slot is not None else "\0"
        yield from ((k, v) for k, v in module.state_dict().items() if isinstance(v, Tensor) and not k.startswith(prefix))
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _add(state: Any, name: str, tensor: Tensor) -> None:
    """Name, shape, dtype and content. Of a matrix: the sums over its rows and columns of its bytes as 64-bit words, as fast as memory."""
    state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.detach().contiguous()
    if flat.numel() == 0:
        return
    if flat.ndim >= 2 and flat[0].numel() * flat.element_size() % 8 == 0:
        words = flat.reshape(flat.shape[0], -1).view(torch.int64)
        parts = [words.sum(dim=1), words.sum(dim=0)]
    else:
        parts = [flat.reshape(-1).view(torch.uint8)]
    for part in parts:
        state.update(part.cpu().numpy().tobytes())
