"""The second seam: attention functions of our own, through which prefixes and packed documents enter a model.

``byway_sdpa`` and ``byway_eager`` are registered with transformers next to ``sdpa`` and ``eager`` and compute the same,
except that side paths with :meth:`~byway.core.slots.SidePath.attend` may rewrite keys, values, mask and position bias.
Each has a mask function, because transformers builds no mask for a name without one. The cache of keys and values is
never touched.

``byway_packed_sdpa`` and ``byway_packed_eager`` (:mod:`byway.engine.attention.packing`) also take packed batches:
documents side by side in one row, each of which attends to itself only. ``cu_seq_lens_q`` holds the start of each
document and, last, the total. If documents share a prefix that is in the row once, ``prefix_spans`` holds for each
segment the spans (begin, end) of the row that precede it: the segment attends to those and to itself.

Shapes: b batch, h query heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byway.core.families import facts
from byway.core.slots import Slot, slot_of
from byway.errors import AdapterError

__all__ = [
    "PACKED_PREFIX",
    "Call",
    "Installed",
    "as_additive",
    "attend",
    "check",
    "implementation_of",
    "install",
    "is_installed",
    "map_names",
    "packed",
    "recorded",
    "register",
    "restore",
]

_PREFIX = "byway_"
PACKED_PREFIX = "byway_packed_"
_PLAIN = ("sdpa", "eager")
_PACKED: ContextVar[int | None] = ContextVar("byway_packed_batch", default=None)
"""Tokens of the longest document of the packed batch; None outside one."""
_RECORD: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("byway_recorded_attention", default=None)


@dataclass
class Installed:
    """The state that :func:`restore` needs."""

    previous: Any
    """The implementation before :func:`install`: a name, or names by sub-configuration."""
    handle: RemovableHandle


def check(model: nn.Module) -> Any:
    """Return the plain implementation of `model`: a name, or ``{"": own, sub-configuration: ...}``.

    Raises:
        AdapterError: `model` is not a transformers model, its attention does not go through transformers' registry, or
            its implementation is neither sdpa nor eager.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not facts(model).attention_registry:
        raise AdapterError(f"the attention of {name} does not go through transformers' registry, so Byway cannot act in it")

    def plain(own: str) -> str:
        own = own.removeprefix(PACKED_PREFIX).removeprefix(_PREFIX)
        if own not in _PLAIN:
            raise AdapterError(
                f"{name} uses the attention implementation {own!r}; Byway supports sdpa and eager", "model.set_attn_implementation('sdpa')"
            )
        return own

    return map_names(implementation_of(model.config), plain)


def install(model: nn.Module) -> Installed:
    """Switch `model` and its parts to our version of their attention. Raises what :func:`check` raises."""
    previous = check(model)
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(map_names(previous, lambda own: _PREFIX + own))
    return Installed(previous, model.register_forward_pre_hook(_still_installed))


def restore(model: nn.Module, installed: Installed) -> None:
    """Undo :func:`install`. An implementation that the user has chosen since then is kept."""
    installed.handle.remove()
    if is_installed(model):
        model.set_attn_implementation(installed.previous)


def implementation_of(config: Any) -> Any:
    """Return the implementation of a configuration in the form that ``set_attn_implementation`` takes."""
    parts = {key: vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None}
    own = config._attn_implementation
    return {"": own} | {key: implementation_of(part) for key, part in parts.items()} if parts else own


def map_names(implementation: Any, rename: Callable[[str], str]) -> Any:
    """Return `implementation` with all names renamed. None, as of another library's backbone, stays None."""
    if isinstance(implementation, dict):
        return {key: map_names(part, rename) for key, part in implementation.items()}
    return None if implementation is None else rename(implementation)


def is_installed(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """True if `model` attends through one of our functions."""
    return isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX)


def _still_installed(module: PreTrainedModel, args: Any) -> None:
    if not is_installed(module):
        implementation = str(module.config._attn_implementation)
        raise AdapterError(
            f"set_attn_implementation({implementation!r}) was called after attach, which removes the adapter from the attention",
            "set the implementation before attaching; Byway supports sdpa and eager",
        )


@contextmanager
def packed(longest: int | None = None) -> Iterator[None]:
    """Wrap one forward pass of a packed batch, so that transformers builds no (t, u) mask over the whole row.

    Args:
        longest: tokens of the longest document; None: unknown. With local attention the mask is still built, unless
            every document fits into the window.
    """
    token = _PACKED.set(sys.maxsize if longest is None else longest)
    try:
        yield
    finally:
        _PACKED.reset(token)


@contextmanager
def recorded() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record the keys and values (b, g, u, e) of our attention functions, by ``id(module)``."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


Documents = Callable[["Call", Tensor, Tensor, Tensor, "Tensor | None", tuple[Any, Any], Any, Any], Tensor]
"""(call, query, key, value, mask, bounds, prefix spans, positions read) → attention (b, t, h, e)."""


def register(prefix: str, documents: Documents) -> None:
    """Register ``<prefix>sdpa`` and ``<prefix>eager`` with transformers. Packed batches are passed to `documents`."""
    for plain in _PLAIN:
        AttentionInterface.register(prefix + plain, _attention_over(plain, documents))
        AttentionMaskInterface.register(prefix + plain, _mask_over(plain))


def _attention_over(plain: str, documents: Documents) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return our version of the `plain` function, called as ``(module, query, key, value, mask, **options)``."""

    def attention(
        module: nn.Module,
        query: Tensor,  # (b, h, t, e)
        key: Tensor,  # (b, g, u, e)
        value: Tensor,  # (b, g, u, e)
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling() and (record := _RECORD.get()) is not None:
            record[id(module)] = (key, value)
        starts_q, starts_k = options.pop("cu_seq_lens_q", None), options.pop("cu_seq_lens_k", None)
        prefixes, read = options.pop("prefix_spans", None), options.pop("positions_read", None)
        options.pop("max_length_q", None)
        options.pop("max_length_k", None)
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if plain == "eager":  # each family defines its own
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        call = Call(function, module, options)
        if starts_q is None:
            return attend(call, query, key, value, attention_mask)
        return documents(call, query, key, value, attention_mask, (starts_q, starts_k), prefixes, read), None

    return attention


def _mask_over(plain: str) -> Callable[..., Any]:
    """Return the mask function of `plain`, which builds no mask for a packed batch unless attention is local."""

    def mask(*args: Any, **options: Any) -> Any:
        # dynamo cannot read a ContextVar: compiled code builds the mask of the whole row, and each document uses its
        # part of it
        longest = None if torch.compiler.is_compiling() else _PACKED.get()
        window = options.get("local_size")
        if longest is not None and (window is None or longest < window):
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[plain](*args, **options)

    return mask


@dataclass(frozen=True)
class Call:
    """One call of an attention function, without query, key, value and mask."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    options: dict[str, Any]

    @property
    def causal(self) -> bool:
        """True if a query sees only the keys up to its own position."""
        is_causal = self.options.get("is_causal")
        return bool(vars(self.module).get("is_causal", True) if is_causal is None else is_causal)

    @property
    def eager(self) -> bool:
        """True for eager attention, which adds the mask to its scores and is causal through the mask only."""
        return self.function is not ALL_ATTENTION_FUNCTIONS["sdpa"]

    @property
    def bare(self) -> bool:
        """True if only queries, keys and values count: sdpa without bias, softcap or side path, not compiled."""
        # sdpa itself refuses a softcap
        plain = not self.eager and self.options.get("position_bias") is None and self.options.get("softcap") is None
        return plain and self.slot is None and not torch.compiler.is_compiling()

    @property
    def slot(self) -> Slot | None:
        """The slot of the module, if it has active side paths with ``attend``."""
        slot = slot_of(self.module)
        return None if slot is None or not slot.attends or slot.silent() else slot

    def scale(self, query: Tensor) -> float:
        """Return the factor of the scores; 1/√e unless the model sets one."""
        scaling = self.options.get("scaling")
        return query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    def plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **other: Any) -> Tensor:
        """Return :func:`attend` of these states (b, t, h, e), with `other` replacing options of the same name."""
        return attend(Call(self.function, self.module, {**self.options, **other}), query, key, value, mask)[0]


def attend(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Call the attention function once, after active side paths have rewritten keys, values, mask and bias.

    Returns (output (b, t, h, e), attention weights or None).
    """
    slot, options = call.slot, dict(call.options)
    if slot is None:
        return call.function(call.module, query, key, value, mask, **options)
    additive = mask is not None and mask.dtype != torch.bool
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask is not None and additive else mask
    # an additive mask may contain more than visibility: the relative positions of Swin and BEiT
    offset = mask.masked_fill(~seen, 0) if mask is not None and seen is not None and additive else None
    if seen is None and call.causal and query.shape[2] > 1:
        t, u = query.shape[2], key.shape[2]
        # aligned with the first key, like torch's causal kernel: a static cache has unused room after the last query
        seen = torch.ones(t, u, dtype=torch.bool, device=query.device).tril()[None, None]
    bias = options.pop("position_bias", None)
    for side in slot.attends:
        key, value, seen, bias = side.attend(query, key, value, seen, bias)
    if bias is not None:
        options["position_bias"] = bias
    if seen is None or not (additive or call.eager):
        return call.function(call.module, query, key, value, seen, **options)
    mask = as_additive(seen, query.dtype)
    if offset is not None:
        # side paths only ever add keys in front
        mask = mask + F.pad(offset, (mask.shape[-1] - offset.shape[-1], 0))
    return call.function(call.module, query, key, value, mask, **options)


def as_additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that eager attention adds to its scores: 0 if `seen`, else the lowest number of `dtype`."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _outside_packing(*_: Any) -> Tensor:
    raise AdapterError(
        "the model was given a packed batch (cu_seq_lens_q) outside packing(model)",
        "with byway.engine.attention.packing.packing(model): ...",
    )


register(_PREFIX, _outside_packing)
