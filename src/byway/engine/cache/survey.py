"""Run a shortcut on one document to find the form, width and dtype of its states, and all tensors they depend on."""

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
import transformers
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from byway.base.arithmetic.int8 import in_int8
from byway.base.fingerprint import NOT_ARCHITECTURE
from byway.core.adapter import adapters
from byway.core.attention import packed
from byway.core.families import inside
from byway.core.modes import evaluating
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
    """By path, of the modules that give and those that are skipped."""
    rows: int
    """States of the document that was run."""
    images: bool
    """True if documents are not token ids, so that the shape of a batch does not tell the number of states."""
    dependencies: Callable[[], dict[str, str]]
    """Computes :attr:`depends`."""

    @cached_property
    def depends(self) -> Mapping[str, str]:
        """What the states depend on besides the documents. Reads every tensor of the trunk once."""
        return self.dependencies()

    @property
    def width(self) -> int:
        """Elements kept per token."""
        return sum(self.given[path].width for path in self.shortcut.gives)


def survey(model: nn.Module, shortcut: Shortcut, inputs: Mapping[str, Any]) -> Survey:
    """Run `inputs` (one document) through the trunk.

    Raises:
        AdapterError: a layer returns more than hidden states, is not run, or sees positions other than the tokens.
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

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        raise Reached

    with ExitStack() as stack:
        for path, module in base_modules(model):
            stack.callback(module.register_forward_pre_hook(lambda *_, path=path: started.setdefault(path)).remove)
            stack.callback(module.register_forward_hook(lambda *_, path=path: finished.setdefault(path)).remove)
        stack.enter_context(capturing(model, dict.fromkeys((*shortcut.skips, *shortcut.gives), 0), seen, lambda: None))
        stack.callback(model.get_submodule(shortcut.runner).register_forward_hook(stop, prepend=True).remove)
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
    started_before, finished_before = before[0]
    whole = finished_before | set(shortcut.skips) | set(shortcut.gives)
    return Survey(shortcut, given, rows, ids is None, partial(_depends, model, whole, started_before - whole))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the trunk on `inputs` without a graph, until :class:`Reached`; restores modes and random states.

    Independent of the context of the caller: the same inside ``packed()`` or ``disabled(model)``.
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
    """Compute without a graph and in evaluation mode within this context; restores modes and random states."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(sorted(devices)):
        yield


def _given(path: str, out: Any, calls: int) -> Given:
    if isinstance(out, Tensor):
        return Given(path, lambda states: states, out.shape[-1], out.dtype, calls)
    if isinstance(out, ModelOutput) and isinstance(out.get("last_hidden_state"), Tensor) and len(out) == 1:
        hidden, kind = out["last_hidden_state"], type(out)
        return Given(path, lambda states: kind(last_hidden_state=states), hidden.shape[-1], hidden.dtype, calls)
    if isinstance(out, tuple) and isinstance(out[0], Tensor) and all(entry is None for entry in out[1:]):
        rest = out[1:]
        return Given(path, lambda states: (states, *rest), out[0].shape[-1], out[0].dtype, calls)
    raise AdapterError(f"{path} returns more than hidden states")


# ---------------------------------------------------------------- what the states depend on


def _depends(model: nn.Module, whole: set[str], around: set[str]) -> dict[str, str]:
    """Return what the states depend on.

    Args:
        model: the model.
        whole: modules that run before the states are reached, whose tensors count with those of all their submodules.
        around: modules that have only started by then, of which only their own tensors count.
    """
    state = hashlib.sha256()
    frozen: set[str] = set()
    roots = {path for path in whole if not any(other != path and inside(path, other) for other in whole)}
    for path, module in base_modules(model):
        if not (path in around or any(inside(path, root) for root in roots)):
            continue
        for name, tensor in _own_tensors(module):
            _add(state, f"{path}.{name}", tensor)
    for path, _, slot in slots(model):
        if path in around or any(inside(path, root) for root in roots):
            for name, side in slot.sides():
                if name in slot.active and not side.needs_gradient():
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
        # the order of summation depends on how the work is divided
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
    }


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that decide the computation."""
    kept = {name: value for name, value in config.items() if name not in NOT_ARCHITECTURE and "dropout" not in name}
    return {name: _fields(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of this module itself; of a quantized one, the tensors it is stored as."""
    if is_quantized(module):
        slot = slot_of(module)
        prefix = "byway." if slot is not None else "\0"
        yield from ((k, v) for k, v in module.state_dict().items() if isinstance(v, Tensor) and not k.startswith(prefix))
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _add(state: Any, name: str, tensor: Tensor) -> None:
    """Hash name, shape, dtype and content; of a matrix the sums of its 64-bit words over rows and over columns."""
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
